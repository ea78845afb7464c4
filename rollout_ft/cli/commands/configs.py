"""`config show`, `schema` and `template`: what the config is, and what it may be.

Owns their options. Starts nothing.
"""

from __future__ import annotations

import orjson
import typer

from rollout_ft.cli.options import AsJson, ConfigFile, Overrides

app = typer.Typer(no_args_is_help=True, help="The config: what it is, what it may be.")


@app.command("show")
def config_show(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """The whole config, with what the file and the overrides set."""
    from rollout_ft.config import load

    print(orjson.dumps(load(config, overrides).model_dump(mode="json"), option=orjson.OPT_INDENT_2).decode())


@app.command("schema")
def config_schema() -> None:
    """The JSON schema of the config."""
    from rollout_ft.config import Config

    print(orjson.dumps(Config.model_json_schema(), option=orjson.OPT_INDENT_2).decode())


@app.command("template")
def config_template(config: ConfigFile = None, overrides: Overrides = None, json: AsJson = False) -> None:
    """What the model's chat template does, and whether conversations can be continued with it token by token."""
    from rollout_ft.cli.template import report
    from rollout_ft.config import load

    print(report(load(config, overrides), json))
