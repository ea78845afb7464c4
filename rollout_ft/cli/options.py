"""What several commands take: the config and its overrides, a run's directory, sizes, `--json`.

Owns how these are said on the command line, the same everywhere. Knows no command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value …", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]
RunDirectory = Annotated[Path, typer.Argument(help="what `run` wrote to")]
GatewayUrl = Annotated[str, typer.Option(help="what `serve` printed (else ROLLOUT_FT_GATEWAY_URL)")]
OperatorKeyFile = Annotated[Path | None, typer.Option(help="has the operator's key (else ROLLOUT_FT_OPERATOR_KEY)")]
TokensIn = Annotated[int, typer.Option(min=1, help="new tokens of a request")]
TokensOut = Annotated[int, typer.Option(min=1, help="tokens of a reply")]
