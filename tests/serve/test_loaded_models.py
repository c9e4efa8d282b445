"""Following a registry: new versions are taken over, broken ones are not, a canary is compared."""

import asyncio
import logging
import random
import shutil
import threading
from concurrent.futures import Future

import pytest
from making import reviews

from raybert.errors import ConfigError, UserError
from raybert.serve.http.schemas import PredictRequest
from raybert.serve.runtime import loaded_model
from raybert.serve.runtime.loaded_model import ModelSource, find
from raybert.serve.runtime.service import Service
from raybert.serve.runtime.threads import ModelThreads
from raybert.serve.settings import ServeConfig
from raybert.storage.folder import Folder
from raybert.storage.registry import Registry

TEXTS = [text for text, _ in reviews(20, seed=8)]


@pytest.fixture
def storage(model, tmp_path):
    """A registry with two versions of a model; the second one's labels are the other way round."""
    registry = Registry(str(tmp_path))
    registry.promote("mine", model)
    other = Folder(shutil.copytree(model.path, tmp_path / "other"))
    config = other.read_json("config.json")
    other.write_json("config.json", {**config, "id2label": {"0": "pos", "1": "neg"}})
    registry.promote("mine", other)
    registry.rollback("mine")
    return str(tmp_path)


def move(storage, version):
    Registry(storage).rollback("mine", version)


def version_of(storage, version):
    return Registry(storage).folder("mine", version)


def service_of(storage, **changes):
    values = {"model": "mine", "registry": storage, "precision": "fp32", "poll_s": 0.01}
    made = Service(ServeConfig.model_validate({**values, **changes}))
    made.load()
    return made


async def label(service, text="a superb film"):
    answer = await service.predict(PredictRequest(inputs=text))
    return answer[0]["label"]


def test_a_promoted_version_is_taken_over_and_a_rollback_too(storage):
    service = service_of(storage)

    async def go():
        watch = asyncio.create_task(service.catalog.watch())
        assert await label(service) == "pos"
        for version, expected in ((2, "neg"), (1, "pos")):
            move(storage, version)
            for _ in range(1000):
                if service.catalog.first.version == f"v{version}":
                    break
                await asyncio.sleep(0.01)
            assert service.catalog.first.version == f"v{version}"
            assert await label(service) == expected
        watch.cancel()

    asyncio.run(go())
    assert service.metrics.value("model_loads_total", model="mine", outcome="loaded") == 2
    service.close()


def test_requests_that_have_begun_end_with_the_version_that_they_began_with(storage):
    service = service_of(storage)
    block = Future()

    async def go():
        service._workers.whole.submit(block.result, 30)
        tasks = [asyncio.create_task(label(service)) for _ in range(20)]
        while service.catalog.first.batcher.queued < 19:  # the other one is under way
            await asyncio.sleep(0.01)
        move(storage, 2)
        await service.catalog.refresh()
        assert service.catalog.first.version == "v2"
        block.set_result(None)
        return await asyncio.gather(*tasks), await label(service)

    assert asyncio.run(go()) == (["pos"] * 20, "neg")
    service.close()


@pytest.mark.parametrize("broken", ["missing", "cut short", "no classifier"])
def test_a_broken_version_is_told_once_and_the_old_one_serves_on(
    storage, pretrained, broken, caplog
):
    caplog.set_level(logging.INFO)
    service = service_of(storage)
    folder = version_of(storage, 2)
    move(storage, 2)
    if broken == "cut short":
        folder.write_bytes("model.safetensors", folder.read_bytes("model.safetensors")[:-9])
    elif broken == "no classifier":
        shutil.copytree(pretrained.path, folder.path, dirs_exist_ok=True)
    else:
        shutil.rmtree(folder.path)

    async def go():
        for _ in range(3):
            await service.catalog.refresh()
        return await label(service)

    assert asyncio.run(go()) == "pos"
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "version v1 serves on" in errors[0].getMessage()
    assert errors[0].exc_info is None
    assert service.metrics.value("model_loads_total", model="mine", outcome="refused") == 1
    service.close()


def test_a_canary_answers_its_share_and_is_compared(storage):
    service = service_of(
        storage,
        canary={"model": version_of(storage, 2).uri, "share": 0.5},
    )

    async def go():
        return [await label(service, text) for text in TEXTS * 5]

    asyncio.run(go())
    metrics, name = service.metrics, service.catalog.canary.name
    theirs = metrics.value("texts_total", model=name)
    assert theirs + metrics.value("texts_total", model="mine") == 100
    assert 20 < theirs < 80
    assert metrics.value("canary_total", model=name, agree="false") == theirs  # labels are swapped
    assert metrics.value("canary_difference_total", model=name) > 0
    assert service.info()["canary"]["share"] == 0.5
    service.close()


@pytest.mark.parametrize("trouble", ["slow", "slow to read", "full", "broken"])
def test_a_canary_in_trouble_costs_no_answer(storage, trouble, monkeypatch, caplog):
    canary = {"model": version_of(storage, 2).uri, "share": 0.9}
    service = service_of(storage, canary=canary, timeout_s=0.4)
    monkeypatch.setattr(random, "random", lambda: 0.0)
    tried, gate = service.catalog.canary, threading.Event()

    def broken(rows):
        raise RuntimeError("no")

    if trouble == "slow":  # a batch that takes its time, before which others wait
        monkeypatch.setattr(tried.batcher, "_threads", ModelThreads(1))
        monkeypatch.setattr(tried.batcher, "_compute", lambda rows: gate.wait(30))
    elif trouble == "slow to read":
        monkeypatch.setattr(tried, "encode", lambda texts, windows: gate.wait(30))
    elif trouble == "full":
        monkeypatch.setattr(tried.batcher, "_speed", 1.0)
        monkeypatch.setattr(tried.batcher, "_queued", 10**6)
    else:
        monkeypatch.setattr(tried.batcher, "_compute", broken)

    async def go():
        count = 1 if trouble == "slow to read" else 5  # the thread that reads is everybody's
        try:
            return await asyncio.gather(*(label(service) for _ in range(count)))
        finally:
            gate.set()

    found = asyncio.run(go())
    assert set(found) == {"pos"}  # the first model's word
    metrics = service.metrics
    assert metrics.value("texts_total", model="mine") == len(found)
    assert metrics.value("canary_missed_total", model=tried.name) == len(found)
    told = [r.getMessage() for r in caplog.records if "the canary failed" in r.getMessage()]
    assert len(told) == 1  # however many there are
    service.close()


def test_who_names_a_model_gets_it_and_no_canary(storage):
    service = service_of(
        storage,
        canary={"model": version_of(storage, 2).uri, "share": 0.99},
    )

    async def go():
        request = PredictRequest(inputs="a superb film", model="mine")
        return [(await service.predict(request))[0]["label"] for _ in range(30)]

    assert set(asyncio.run(go())) == {"pos"}
    service.close()


def test_several_models_by_name(storage):
    config = ServeConfig.model_validate(
        {
            "model": version_of(storage, 1).uri,
            "models": {"second": version_of(storage, 2).uri},
            "precision": "fp32",
        }
    )
    service = Service(config)
    service.load()

    async def go(name):
        request = PredictRequest(inputs="a superb film", model=name)
        return (await service.predict(request))[0]["label"]

    assert [asyncio.run(go(name)) for name in (None, "v1", "second")] == ["pos", "pos", "neg"]
    assert [one["name"] for one in service.info()["models"]] == ["v1", "second"]
    service.close()


def test_two_models_of_one_name_are_refused(storage):
    values = {"model": version_of(storage, 1).uri, "models": {"v1": version_of(storage, 2).uri}}
    service = Service(ServeConfig.model_validate({**values, "precision": "fp32"}))
    with pytest.raises(ConfigError, match="two models have the name v1"):
        service.load()
    service.close()


def test_what_a_path_or_a_name_means(model, tmp_path):
    assert find(model.uri, None).current().uri == model.uri
    assert find(model.uri, None).name == "run"  # the folder that the model/ lies in
    assert find(model.uri, None, "mine").name == "mine"
    run = Folder(model.path.rpartition("/")[0])
    assert find(run.uri, None).current().uri == model.uri
    with pytest.raises(UserError, match="neither a folder nor a name in the registry of"):
        find("nobody-knows-this-name", str(tmp_path))


def test_a_model_is_found_anew_at_every_look(model):
    assert loaded_model.find(model.uri, None).storage is None
    source = ModelSource("a", model.path.rpartition("/")[0])
    assert source.current().uri == model.uri
