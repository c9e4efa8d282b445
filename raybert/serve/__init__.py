"""Answering: the classifier over raw texts, in bulk through Ray Data and over HTTP on Ray Serve.

classifier.py   texts -> scores; with windows, precision, engines, choice, explain and filler
batch.py        files of millions, through Ray Data; evaluate.py measures with it
service.py      what a replica does: catalog and models hold what it knows, batcher how it waits
api.py          the routes; bodies, infer, gate, auth and metrics are their parts, document
                and docs describe them
app.py          the deployment on Ray Serve; launch starts it, ingress and edge stand before it,
                logs writes its log
client.py       asks it
"""
