"""Online inference: HTTP on Ray Serve, batches by a budget of tokens, models from a registry.

POST /predict from the socket to the logits, file by file:

1. deploy/haproxy.py     HAProxy accepts the connection. It responds 429 itself while all replicas
                         report a full queue (deploy/templates/rules.cfg), else it chooses a replica
2. http/middleware.py    In this order: LoadSheddingMiddleware in front of Serve (429), CORS,
                         AccessMiddleware (401, 429, log and metrics), BodyLimitMiddleware (413)
3. http/json_route.py    JSONRoute parses the body as strict JSON; RequestBody reports the first
                         mistake in one line
4. http/text_routes.py   PredictRequest and predict(): limits, time-out, ranking and response
5. runtime/service.py    Service.score(): room in the queue, tokenization in its thread, model, and
                         for a share of the requests the Canary
6. runtime/loaded_models.py  LoadedModel: one version with its queue; averages the logits of windows
7. runtime/batching.py   Batcher: batches by tokens; ModelThreads: the threads that compute them
8. raybert/inference/classifier.py  TextClassifier: texts to rows, windows of long texts; score():
                         rows to logits

http/api.py assembles the application, deploy/deployment.py makes it a deployment of Ray Serve,
deploy/launch.py starts Serve for `raybert serve`.
"""
