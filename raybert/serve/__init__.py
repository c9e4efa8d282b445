"""Online inference: HTTP on Ray Serve, batches by a budget of tokens, models from a registry.

POST /predict from the socket to the logits, file by file:

1. http/admission.py     LoadSheddingMiddleware in front of Serve, then AccessMiddleware: the key,
                         and 429 while the queue is full
2. http/json_route.py    BodyLimitMiddleware, JSONRoute: a bounded body, parsed as strict JSON
3. http/schemas.py       PredictRequest: validation, and one line about a mistake
4. http/text_routes.py   predict(): limits, time-out, ranking and response
5. runtime/service.py    Service.score(): model, tokenization in its thread, canary
6. runtime/loaded_models.py  LoadedModel: one version with its queue; averages windows
7. runtime/batching.py   Batcher: batches by tokens, computed in the threads of threads.py
8. raybert/inference/classifier.py  TextClassifier.score(): rows to logits

http/api.py assembles the application, deploy/deployment.py makes it a deployment of Ray Serve,
deploy/launch.py starts Serve for `raybert serve`, with HAProxy in front (deploy/haproxy.py).
"""
