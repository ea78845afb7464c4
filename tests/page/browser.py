"""A run and a browser that looks at its page: what the checks of the page share.

Owns the two processes, in an environment of its own: playwright with a Chromium that is installed here, or its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

PROJECT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SHOTS = os.environ.get("SHOTS")
"""A directory for screenshots, where somebody wants to look at them."""


@dataclass
class Stage:
    url: str
    key: str
    _process: subprocess.Popen[str]

    def do(self, what: str, **fields: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **fields}) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        assert "error" not in told, told
        return told

    def link(self, **more: str) -> str:
        rest = "".join(f"&{name}={value}" for name, value in more.items())
        return f"{self.url}/status#key={self.key}{rest}"


@contextmanager
def stage(*overrides: str) -> Iterator[Stage]:
    command = [str(PROJECT / ".venv/bin/python"), str(PROJECT / "tests/page/stage.py"), *overrides]
    process = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = json.loads(process.stdout.readline())
        yield Stage(line["url"], line["key"], process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


@contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"])
        yield made
        made.close()


def shoot(page: Page, name: str, *, whole: bool = True) -> None:
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=whole)
