"""Dashboard and alerts: every name exists, every expression finds data, every alert can fire."""

import json
import re
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from head import RAYBERT, free_port, ray_head
from making import MODEL, make_corpus, reviews, write_csv

from raybert.config import build
from raybert.data.corpus.settings import CorpusConfig
from raybert.storage.folder import Folder
from raybert.train.ray.prometheus import COUNTERS, GAUGES

CLUSTER = Path(__file__).parents[2] / "cluster"
PROMETHEUS = CLUSTER / "prometheus"
DISCOVERY = "/tmp/ray/prom_metrics_service_discovery.json"
PANELS = json.loads((CLUSTER / "grafana" / "raybert.json").read_text())["panels"]
GROUPS = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
ALERTS = {rule["alert"]: (group["name"], rule) for group in GROUPS for rule in group["rules"]}
COMPARED = re.compile(r"(?P<measured>.+) > [0-9.]+")


def charts():
    """Yield (row, panel) of each panel that shows something."""
    row = None
    for panel in PANELS:
        if panel["type"] == "row":
            row = panel["title"]
        else:
            yield row, panel


#: (where it stands, expression), with Grafana's variable as for all runs.
DRAWN = [
    (f"{row}: {panel['title']}", target["expr"].replace("$run", ".*"))
    for row, panel in charts()
    for target in panel["targets"]
]
MEASURED = [
    (f"{group}: {name}", COMPARED.fullmatch(rule["expr"])["measured"])
    for name, (group, rule) in ALERTS.items()
]


def is_serving(where):
    return where.lower().startswith("serving: ")


# Without Prometheus ------------------------------------------------------------------------------


def test_each_panel_has_a_place_and_a_number_of_its_own():
    cells = set()
    for panel in PANELS:
        at = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert mine and not mine & cells, panel["title"]
        assert {x for x, _ in mine} <= set(range(24)), panel["title"]
        cells |= mine
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    tops = [panel["gridPos"]["y"] for panel in PANELS]
    assert tops == sorted(tops)  # a panel belongs to the row before it


def test_each_chart_says_in_what_it_is_measured_and_where_it_comes_from():
    assert {row for row, _ in charts()} == {"Training", "Checkpoints", "Cluster", "Serving"}
    for _, panel in charts():
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert refs and len(set(refs)) == len(refs)
        assert all(target["legendFormat"] for target in panel["targets"])


def test_charts_of_a_run_show_the_runs_that_were_chosen():
    for _, panel in charts():
        for target in panel["targets"]:
            chosen = re.findall(r"ray_raybert_\w+(.{0,13})", target["expr"])
            assert set(chosen) <= {'{run=~"$run"}'}, target["expr"]


def test_what_is_drawn_is_exported_and_what_is_exported_is_drawn():
    exported = {f"ray_raybert_{name}" for name in GAUGES}
    exported |= {f"ray_raybert_{name}_total" for name in COUNTERS}
    used = {name for _, expr in DRAWN + MEASURED for name in re.findall(r"ray_raybert_\w+", expr)}
    assert used == exported


def test_the_other_names_are_rays():
    """Those of this version of Ray: its own dashboards or its agent have them."""
    import ray

    dashboard = Path(ray.__file__).parent / "dashboard" / "modules"
    files = [dashboard / "reporter" / "reporter_agent.py"]
    files += (dashboard / "metrics" / "dashboards").glob("*_panels.py")
    known = set(re.findall(r"\w+", " ".join(file.read_text() for file in files)))
    for where, expr in DRAWN + MEASURED:
        for name in re.findall(r"\bray_(?!raybert_)\w+", expr):
            assert {name, name.removeprefix("ray_")} & known, f"{where}: {name}"


def test_alerts_say_what_to_do():
    assert len(ALERTS) == sum(len(group["rules"]) for group in GROUPS)
    for name, (_, rule) in ALERTS.items():
        assert rule["labels"]["severity"] in ("warning", "critical"), name
        assert "{{ $labels." in rule["annotations"]["summary"], name
        assert len(rule["annotations"]["description"]) > 80, name


# With its tools ----------------------------------------------------------------------------------


def tool(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}, of Debian's package prometheus")
    return path


def promtool(*arguments):
    done = subprocess.run(
        [tool("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_reads_the_configuration():
    promtool("check", "config", PROMETHEUS / "prometheus.yml")


def test_prometheus_reads_the_alerts():
    promtool("check", "rules", PROMETHEUS / "alerts.yml")


def test_every_expression_is_promql(tmp_path):
    rules = [{"record": f"drawn:{n}", "expr": expr} for n, (_, expr) in enumerate(DRAWN)]
    file = tmp_path / "drawn.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "drawn", "rules": rules}]}))
    promtool("check", "rules", file)


HOUR = "x60"  # of minutes
RUN = 'run="imdb/pretrain",WorkerId="1"'
STORE = 'ray_object_store_memory{Location="MMAP_SHM",instance="n1"}'
REQUESTS = 'ray_serve_num_http_requests_total{application="c",route="/",status_code="%d"}'
BUCKET = 'ray_serve_http_request_latency_ms_bucket{application="c",route="/",le="%s"}'
WELL = {
    f"ray_raybert_progress_timestamp_seconds{{{RUN}}}": f"0+60{HOUR}",
    f"ray_raybert_checkpoint_timestamp_seconds{{{RUN}}}": f"0+60{HOUR}",
    f"ray_raybert_skipped_steps{{{RUN}}}": f"0+0{HOUR}",
    f"ray_raybert_restarts{{{RUN}}}": f"7+0{HOUR}",
    f"ray_raybert_checkpoint_failures{{{RUN}}}": f"0+0{HOUR}",
    f"ray_raybert_data_wait_share{{{RUN}}}": f"0.01+0{HOUR}",
    'ray_node_disk_utilization_percentage{instance="n1"}': f"50+0{HOUR}",
    STORE: f"100+0{HOUR}",
    STORE.replace("MMAP_SHM", "SPILLED"): f"900+0{HOUR}",
    'ray_resources{Name="object_store_memory",State="USED",instance="n1"}': f"100+0{HOUR}",
    'ray_resources{Name="object_store_memory",State="AVAILABLE",instance="n1"}': f"900+0{HOUR}",
    REQUESTS % 200: f"0+60{HOUR}",
    BUCKET % 100: f"0+60{HOUR}",
    BUCKET % 5000: f"0+60{HOUR}",
    BUCKET % "+Inf": f"0+60{HOUR}",
}
#: What goes wrong, by the one alert that it must raise.
TROUBLES = {
    "RaybertNoProgress": {f"ray_raybert_progress_timestamp_seconds{{{RUN}}}": f"0+0{HOUR}"},
    "RaybertStepsSkipped": {f"ray_raybert_skipped_steps{{{RUN}}}": f"0+1{HOUR}"},
    "RaybertRestarts": {  # each attempt is a worker of its own
        f"ray_raybert_restarts{{{RUN}}}": "7+0x39 stale",
        f"ray_raybert_restarts{{{RUN.replace('1', '2')}}}": "_x40 10+0x20",
    },
    "RaybertCheckpointOld": {f"ray_raybert_checkpoint_timestamp_seconds{{{RUN}}}": f"0+0{HOUR}"},
    "RaybertCheckpointFailed": {f"ray_raybert_checkpoint_failures{{{RUN}}}": f"0+1{HOUR}"},
    "RaybertWaitsForData": {f"ray_raybert_data_wait_share{{{RUN}}}": f"0.5+0{HOUR}"},
    "RaybertDiskFull": {'ray_node_disk_utilization_percentage{instance="n1"}': f"95+0{HOUR}"},
    "RaybertObjectStoreFull": {STORE: f"950+0{HOUR}"},
    "RaybertServeErrors": {REQUESTS % 503: f"0+6{HOUR}"},
    "RaybertServeSlow": {BUCKET % 100: f"0+0{HOUR}"},
}


def test_each_alert_has_a_trouble():
    assert TROUBLES.keys() == ALERTS.keys()


@pytest.mark.parametrize("alert", [None, *TROUBLES])
def test_an_alert_fires_in_its_own_trouble_and_only_then(alert, tmp_path):
    series = WELL | TROUBLES.get(alert, {})
    fires = [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert else []
    case = {
        "rule_files": [str(PROMETHEUS / "alerts.yml")],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": k, "values": v} for k, v in series.items()],
                "promql_expr_test": [
                    {
                        "expr": 'group by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": "1h",
                        "exp_samples": fires,
                    }
                ],
            }
        ],
    }
    file = tmp_path / "case.yml"
    file.write_text(yaml.safe_dump(case))
    promtool("test", "rules", file)


# A real run under a real Prometheus --------------------------------------------------------------


@pytest.fixture(scope="module")
def binary():
    return tool("prometheus")


@pytest.fixture(scope="module")
def head():
    with ray_head() as started:
        yield started


@pytest.fixture(scope="module")
def training(head, tmp_path_factory):
    """A run on the cluster that goes on for as long as it is watched."""
    path = tmp_path_factory.mktemp("watched")
    rows = reviews(160)
    values = {
        "run": {"name": "watched", "storage": str(path / "runs")},
        "corpus": {
            "source": {"path": write_csv(Folder(path), "labelled.csv", rows)},
            "tokenizer": {"kind": "words", "vocab_size": 512, "min_frequency": 1},
            "seq_len": 16,
            "heldout_fraction": 0.1,
            "rows_per_part": 16,
            "rows_per_group": 4,
        },
        "model": MODEL,
        "pretrain": {
            "steps": 100_000,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "evaluations": None,
            "evaluation_rows": 8,
            "threads": 1,
            "checkpoint_steps": 200,
            "log_every": 20,
            "examples": [],
        },
    }
    config = build(CorpusConfig, values["corpus"], "test")
    make_corpus(
        Folder(path / "runs" / "watched" / "corpus"), texts=[t for t, _ in rows], config=config
    )
    file = path / "watched.yaml"
    file.write_text(json.dumps(values))
    with (path / "log").open("w") as log:
        process = subprocess.Popen(
            [str(RAYBERT), "pretrain", "-c", str(file)],
            env={**head.env, "RAY_ADDRESS": head.gcs},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process, path / "log"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(90)


@pytest.fixture(scope="module")
def prometheus(binary, head, tmp_path_factory):
    """Our configuration, with the head's list of what to scrape; on this machine's own address."""
    path = tmp_path_factory.mktemp("prometheus")
    ours = (PROMETHEUS / "prometheus.yml").read_text()
    assert ours.count(DISCOVERY) == 1
    listed = head.folder / Path(DISCOVERY).name
    (path / "prometheus.yml").write_text(ours.replace(DISCOVERY, str(listed)))
    shutil.copy(PROMETHEUS / "alerts.yml", path)
    ends = time.monotonic() + 60
    while not listed.exists():
        assert time.monotonic() < ends, f"Ray does not write {listed}"
        time.sleep(0.5)
    address = f"127.0.0.1:{free_port()}"
    command = [
        binary,
        f"--config.file={path / 'prometheus.yml'}",
        f"--storage.tsdb.path={path / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(30)


def ask(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        return json.loads(answer.read())


def found(prometheus, expr):
    """What Prometheus answers to an expression; nothing while it does not answer."""
    query = urllib.parse.urlencode({"query": expr})
    try:
        return ask(f"{prometheus}/api/v1/query?{query}")["data"]["result"]
    except OSError:
        return []


@pytest.mark.ray
@pytest.mark.slow
def test_every_expression_finds_data_of_a_real_run(binary, training, prometheus):
    process, log = training
    missing = {where: expr for where, expr in DRAWN + MEASURED if not is_serving(where)}
    assert len(missing) > 25
    missing["said once, there for a minute"] = "count_over_time(ray_raybert_workers[1m]) >= 5"
    ends = time.monotonic() + 240
    while missing and time.monotonic() < ends:
        assert process.poll() is None, log.read_text()
        missing = {w: expr for w, expr in missing.items() if not found(prometheus, expr)}
        time.sleep(2)
    assert not missing, log.read_text()[-2000:]
    [sample] = found(prometheus, "max by (run) (ray_raybert_step)")
    assert sample["metric"] == {"run": "watched/pretrain"}
    for group in ask(f"{prometheus}/api/v1/rules")["data"]["groups"]:
        for rule in group["rules"]:
            assert rule["health"] == "ok", rule


@pytest.mark.ray
@pytest.mark.slow
def test_rays_page_of_training_runs_shows_the_run_and_no_setting_of_it(head, training):
    process, log = training
    url, runs = f"{head.address}/api/train/v2/runs/v1", []
    ends = time.monotonic() + 120
    while not runs and time.monotonic() < ends:
        assert process.poll() is None, log.read_text()
        try:
            runs = ask(url, Authorization=f"Bearer {head.token}")["train_runs"]
        except OSError:  # before the first run there is no page
            pass
        time.sleep(1)
    assert [run["run_settings"]["train_loop_config"] for run in runs] == [
        {"inputs": "WorkerInputs"}
    ]
