"""The command of the HTTP server: serve."""

from __future__ import annotations

from typing import Annotated

import typer

from raybert.cli.options import (
    ConfigOption,
    JsonOption,
    NameOption,
    SetOption,
    load_experiment,
    new_display,
    print_json,
)

app = typer.Typer()


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="A `model/`, a run, an experiment, or a name in the registry."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Sets serve.host; 0.0.0.0 requires serve.keys.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Sets serve.port.")] = None,
    keys: Annotated[str | None, typer.Option(help="Sets serve.keys, a file of keys.")] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a model over HTTP until Ctrl-C: labels, word attributions, masked words, a page.

    It exits with an error when no replica answers for five minutes.

    Example: `raybert serve runs/demo`, then open http://127.0.0.1:8000
    """
    from raybert.serve.deploy.launch import log_folder, read_state, serving
    from raybert.serve.deploy.status import watch

    given = {"model": model, "host": host, "port": port, "keys": keys}
    experiment = load_experiment(config, overrides, name)
    serve_config = experiment.serve.changed(
        {key: value for key, value in given.items() if value is not None},
        model=experiment.folder.uri,
        registry=experiment.run.storage,
    )
    display = new_display()
    with (
        display.stage("serve"),
        serving(serve_config, experiment.ray, on_progress=display.progress) as url,
    ):
        display.print(f"serve     listening on {url}; API: {url}/docs; Ctrl-C stops it")
        log = log_folder()
        if log is not None:
            display.print(f"serve     log: {log}")
        if as_json:
            print_json({"url": url, "model": serve_config.model})
        try:
            watch(read_state, lambda line: display.print(f"serve     {line}"))
        except KeyboardInterrupt:
            display.print("serve     stopping; Ctrl-C again to stop at once")
