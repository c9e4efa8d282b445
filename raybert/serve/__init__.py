"""Online inference: HTTP on Ray Serve, batches by a budget of tokens, models from a registry.

POST /predict from the socket to the logits, file by file:

1. deploy/templates/rules.cfg  HAProxy accepts the connection. It responds 429 itself while all
                         replicas report a full queue, else it chooses a replica. With TLS,
                         `ingress=proxy` or no HAProxy, Serve's own proxy chooses
2. http/middleware.py    In this order: LoadSheddingMiddleware before Serve's own work (400, and
                         401 and 429 where HAProxy connects to the replica and `serve.cors` is
                         not set), CORS, AccessMiddleware (401, 429, log and metrics),
                         BodyLimitMiddleware (400, 408, 413)
3. http/json_route.py    JSONRoute parses the body as strict JSON; RequestBody reports the first
                         mistake in one line
4. http/text_routes.py   PredictRequest and predict(): limits, time-out, answer of the task
5. runtime/service.py    Service.score(): place in the queue, tokenization in its thread, model, and
                         for a share of the requests the Canary
6. runtime/loaded_models.py  LoadedModel: one version with its queue; averages the logits of windows
7. runtime/batching.py   Batcher: batches by tokens; ModelThreads: the threads that compute them
8. raybert/inference/classifier.py  TextClassifier: texts to rows, windows of long texts; score():
                         rows to logits

http/api.py assembles the application, deploy/deployment.py makes it a deployment of Ray Serve,
deploy/launch.py starts Serve for `raybert serve`.
"""
