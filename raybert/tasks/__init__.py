"""What is learned, one file a task: masked language modelling, classification."""
