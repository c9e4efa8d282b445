"""Models follow the registry: new versions are loaded, damaged ones are not; canaries."""

import asyncio
import logging
import random
import shutil
import threading
from concurrent.futures import Future

import pytest
from making import reviews

from raybert.errors import ConfigError, UserError
from raybert.serve.http.server_routes import server_info
from raybert.serve.runtime.batching import ModelThreads
from raybert.serve.runtime.model_sources import ModelSource, find_source
from raybert.serve.runtime.service import Service
from raybert.serve.settings import ServeConfig
from raybert.storage.folder import Folder
from raybert.storage.registry import Registry

TEXTS = [text for text, _ in reviews(20, seed=8)]


def count(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"raybert_{name}", labels) or 0.0


@pytest.fixture
def storage(model, tmp_path):
    """A registry with two versions of a model; the second one's labels are swapped."""
    registry = Registry(str(tmp_path))
    registry.promote("mine", model)
    other = Folder(shutil.copytree(model.path, tmp_path / "other"))
    config = other.read_json("config.json")
    other.write_json("config.json", {**config, "id2label": {"0": "pos", "1": "neg"}})
    registry.promote("mine", other)
    registry.rollback("mine")
    return str(tmp_path)


def set_current(storage, version):
    Registry(storage).rollback("mine", version)


def version_of(storage, version):
    return Registry(storage).folder("mine", version)


def service_of(storage, **changes):
    values = {"model": "mine", "registry": storage, "precision": "fp32", "poll_s": 0.01}
    made = Service(ServeConfig.model_validate({**values, **changes}))
    made.load()
    return made


async def label(service, text="a superb film", name=None):
    logits, model, _ = await service.score([text], name, None)
    return model.labels[int(logits[0].argmax())]


def test_a_promoted_version_is_loaded_and_a_rollback_too(storage):
    service = service_of(storage)

    async def go():
        watch = asyncio.create_task(service.models.watch())
        assert await label(service) == "pos"
        for version, expected in ((2, "neg"), (1, "pos")):
            set_current(storage, version)
            for _ in range(1000):
                if service.models.default.version == f"v{version}":
                    break
                await asyncio.sleep(0.01)
            assert service.models.default.version == f"v{version}"
            assert await label(service) == expected
        watch.cancel()

    asyncio.run(go())
    assert count(service.metrics, "model_loads_total", model="mine", outcome="loaded") == 2
    service.close()


def test_running_requests_are_completed_by_the_version_that_they_began_with(storage):
    service = service_of(storage)
    block = Future()

    async def go():
        service._threads.all_cores.submit(block.result, 30)
        tasks = [asyncio.create_task(label(service)) for _ in range(20)]
        while service.models.default.batcher.queued_tokens < 19:  # one is running
            await asyncio.sleep(0.01)
        set_current(storage, 2)
        await service.models.refresh()
        assert service.models.default.version == "v2"
        block.set_result(None)
        return await asyncio.gather(*tasks), await label(service)

    assert asyncio.run(go()) == (["pos"] * 20, "neg")
    service.close()


@pytest.mark.parametrize("broken", ["missing", "cut short", "no classifier"])
def test_a_damaged_version_is_logged_once_and_the_previous_one_remains(
    storage, pretrained, broken, caplog
):
    caplog.set_level(logging.INFO)
    service = service_of(storage)
    folder = version_of(storage, 2)
    set_current(storage, 2)
    if broken == "cut short":
        folder.write_bytes("model.safetensors", folder.read_bytes("model.safetensors")[:-9])
    elif broken == "no classifier":
        shutil.copytree(pretrained.path, folder.path, dirs_exist_ok=True)
    else:
        shutil.rmtree(folder.path)

    async def go():
        for _ in range(3):
            await service.models.refresh()
        return await label(service)

    assert asyncio.run(go()) == "pos"
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "version v1 remains" in errors[0].getMessage()
    assert errors[0].exc_info is None
    assert count(service.metrics, "model_loads_total", model="mine", outcome="refused") == 1
    service.close()


def test_a_canary_answers_its_share_and_is_compared_with_the_current_model(storage):
    service = service_of(
        storage,
        canary={"model": version_of(storage, 2).uri, "share": 0.5},
    )

    async def go():
        return [await label(service, text) for text in TEXTS * 5]

    asyncio.run(go())
    metrics, name = service.metrics, service.models.canary.name
    answered = count(metrics, "texts_total", model=name)
    assert answered + count(metrics, "texts_total", model="mine") == 100
    assert 20 < answered < 80
    assert (
        count(metrics, "canary_total", model=name, agree="false") == answered
    )  # labels are swapped
    assert count(metrics, "canary_difference_total", model=name) > 0
    assert server_info(service)["canary"]["share"] == 0.5
    service.close()


@pytest.mark.parametrize("failure", ["slow", "slow tokenizer", "full", "exception"])
def test_a_failing_canary_costs_no_answer(storage, failure, monkeypatch, caplog):
    settings = {"model": version_of(storage, 2).uri, "share": 0.9}
    service = service_of(storage, canary=settings, timeout_s=0.4)
    monkeypatch.setattr(random, "random", lambda: 0.0)
    canary, release = service.models.canary, threading.Event()

    def broken(rows):
        raise RuntimeError("no")

    if failure == "slow":  # its batches hang, and the queue waits for them
        monkeypatch.setattr(canary.batcher, "_threads", ModelThreads(1))
        monkeypatch.setattr(canary.batcher, "_compute", lambda rows: release.wait(30))
    elif failure == "slow tokenizer":
        monkeypatch.setattr(canary, "encode", lambda texts, windows: release.wait(30))
    elif failure == "full":
        monkeypatch.setattr(canary.batcher, "_speed", 1.0)
        monkeypatch.setattr(canary.batcher, "_queued_tokens", 10**6)
    else:
        monkeypatch.setattr(canary.batcher, "_compute", broken)

    async def go():
        count = 1 if failure == "slow tokenizer" else 5  # all models share the tokenizer thread
        try:
            return await asyncio.gather(*(label(service) for _ in range(count)))
        finally:
            release.set()

    found = asyncio.run(go())
    assert set(found) == {"pos"}  # of the current model
    metrics = service.metrics
    assert count(metrics, "texts_total", model="mine") == len(found)
    assert count(metrics, "canary_missed_total", model=canary.name) == len(found)
    logged = [r.getMessage() for r in caplog.records if "the canary failed" in r.getMessage()]
    assert len(logged) == 1
    service.close()


def test_a_request_that_names_a_model_gets_that_one_and_never_the_canary(storage):
    service = service_of(
        storage,
        canary={"model": version_of(storage, 2).uri, "share": 0.99},
    )

    async def go():
        return [await label(service, name="mine") for _ in range(30)]

    assert set(asyncio.run(go())) == {"pos"}
    service.close()


def test_a_request_selects_a_model_by_name(storage):
    config = ServeConfig.model_validate(
        {
            "model": version_of(storage, 1).uri,
            "models": {"second": version_of(storage, 2).uri},
            "precision": "fp32",
        }
    )
    service = Service(config)
    service.load()

    assert [asyncio.run(label(service, name=name)) for name in (None, "v1", "second")] == [
        "pos",
        "pos",
        "neg",
    ]
    assert [one["name"] for one in server_info(service)["models"]] == ["v1", "second"]
    service.close()


def test_two_models_of_one_name_are_refused(storage):
    values = {"model": version_of(storage, 1).uri, "models": {"v1": version_of(storage, 2).uri}}
    service = Service(ServeConfig.model_validate({**values, "precision": "fp32"}))
    with pytest.raises(ConfigError, match="two models have the name v1"):
        service.load()
    service.close()


def test_how_a_path_or_a_name_is_resolved(model, tmp_path):
    assert find_source(model.uri, None).current().uri == model.uri
    assert find_source(model.uri, None).name == "run"  # the folder that the model/ lies in
    assert find_source(model.uri, None, "mine").name == "mine"
    run = Folder(model.path.rpartition("/")[0])
    assert find_source(run.uri, None).current().uri == model.uri
    with pytest.raises(UserError, match="neither a folder nor a name in the registry of"):
        find_source("nobody-knows-this-name", str(tmp_path))


def test_a_run_is_resolved_to_its_model_at_every_call(model):
    assert find_source(model.uri, None).registry is None
    source = ModelSource("a", model.path.rpartition("/")[0])
    assert source.current().uri == model.uri
