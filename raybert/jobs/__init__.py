"""Running on a cluster: estimate, check, submit and follow a job."""
