"""``liubai serve``: checkpoints behind OpenAI's interface."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from liubai.errors import UserError

KEY = "LIUBAI_API_KEY"


def serve(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(metavar="CKPT…", help="Checkpoint folders or hub ids; the first is the default."),
    ],
    name: Annotated[
        list[str] | None, typer.Option(help="Of the model; may be repeated, one a checkpoint.")
    ] = None,
    reward_model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A stage of kind reward_model: judges the best of several."),
    ] = None,
    process_model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A stage of kind process: judges thoughts.")
    ] = None,
    fast: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model for the router's fast way.", show_default="asked"),
    ] = None,
    think: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model for its way with a thought.", show_default="asked"),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; another than this machine needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help=f"What clients must send; better in {KEY}, which others cannot see.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Keys, one a line.")] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name that a proxy calls this server; may be repeated."),
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="A site whose pages may ask; may be repeated.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Answers written at once, a model.")] = 256,
    waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait for a slot.")] = 512,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of prompt and answer.", show_default="the model's, ≤ 8192"),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer at most.", show_default="what fits")
    ] = None,
    max_paths: Annotated[int, typer.Option(min=1, help="Answers that one request may ask for.")] = 64,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1024,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request.")] = 1 << 20,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that one answer may take.")] = 600.0,
    grace: Annotated[float, typer.Option(min=0.0, help="Seconds that open answers get at the end.")] = 30.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of each model.", show_default="cores − 1")
    ] = None,
    patience: Annotated[
        float,
        typer.Option(min=1.0, help="Seconds without a sign of life after which a model is started again."),
    ] = 300.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Serve checkpoints to OpenAI's clients, with a page for people (docs/serving.md)."""
    require_serving()
    import asyncio

    from liubai.commands.shared import checkpoint_folder, compute_of
    from liubai.serve.host import Host
    from liubai.serve.limits import Limits
    from liubai.serve.router import Router
    from liubai.serve.server import Door
    from liubai.serve.server import serve as run

    door = Door(
        host=host,
        port=port,
        keys=keys_of(api_key, api_key_file),
        names=tuple(allow_host or ()),
        origins=tuple(_origin(text) for text in cors or ()),
    )

    def said(text: str) -> None:
        print(text, flush=True)

    compute_of(device)
    folders = [checkpoint_folder(path) for path in checkpoints]
    limits = Limits(
        max_tokens=max_tokens,
        answers=min(max_paths, slots + waiting),
        requests=max_requests,
        body_bytes=max_body,
        answer_s=timeout,
        grace_s=grace,
    )
    hosts = [
        Host(
            called,
            folder,
            reward_model=_judge(reward_model, "reward_model"),
            process_model=_judge(process_model, "process_model"),
            slots=slots,
            waiting=waiting,
            max_length=max_length,
            device=device,
            threads=threads,
            patience_s=patience,
            said=said,
        )
        for called, folder in zip(_names(name or [], folders), folders, strict=True)
    ]
    code = asyncio.run(
        run(
            hosts,
            door,
            limits,
            fast=fast,
            think=think,
            router=Router.load(),
            said=said,
        )
    )
    if code:
        raise typer.Exit(code)


def require_serving() -> None:
    """Raises ``UserError`` where the extra is not installed."""
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise UserError("serving needs FastAPI and uvicorn: pip install 'liubai[serve]'")


def keys_of(key: str | None, file: Path | None) -> tuple[str, ...]:
    """Those of the option and the file; where neither is given, that of the environment."""
    found = [] if key is None else [key]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UserError(f"cannot read the keys in '{file}': {reason}") from error
        found += [line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"there is no key in '{file}'; write one a line")
    if not found and KEY in os.environ:
        found = [os.environ[KEY]]
    for one in found:
        if not one.strip() or one != one.strip() or not (one.isascii() and one.isprintable()):
            # HTTP's headers can carry no others everywhere: no browser sends them
            raise UserError(
                "an API key is made of ASCII letters, digits and signs, with no blanks around them"
            )
    if key is not None and KEY not in os.environ and file is None:
        print(f"liubai: note: others on this machine can see --api-key; {KEY} is safer", file=sys.stderr)
    return tuple(found)


def _judge(path: Path | None, name: str) -> Path | None:
    """The model itself, where the folder of its stage is given. Raises ``UserError`` for what is neither, and
    for a model of another kind: of the two that judge, only a reward model is calibrated."""
    from liubai.model.checkpoint import read_config
    from liubai.stages.scoring import CALIBRATION

    if path is None:
        return None
    option, other = (
        ("--reward-model", "process_model") if name == "reward_model" else ("--process-model", "reward_model")
    )
    if not path.is_dir():
        raise UserError(f"{option} '{path}': there is no such folder")
    for folder in (path, path / name):
        if not (folder / "config.json").is_file():
            continue
        read_config(folder, scorer=True)
        if (folder / CALIBRATION).is_file() != (name == "reward_model"):
            raise UserError(f"{option} '{path}' is a {_spaced(other)}; give a {name} folder")
        return folder
    if (path / other).is_dir():
        raise UserError(f"{option} '{path}' has a {_spaced(other)}, and no {_spaced(name)}")
    raise UserError(f"{option} '{path}' is no model that judges; give a {name} folder")


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _origin(text: str) -> str:
    """Raises ``UserError`` for what no browser sends as an origin."""
    scheme, separator, rest = text.partition("://")
    if text != "*" and (scheme not in ("http", "https") or not separator or not rest or "/" in rest):
        raise UserError(f"--cors '{text}': an origin is like https://example.com, without a path; or *")
    return text


def _names(given: list[str], folders: list[Path]) -> list[str]:
    from liubai.serve.house import names_of

    if not given:
        return names_of(folders)
    if len(given) != len(folders):
        raise UserError(f"{len(given)} --name for {len(folders)} checkpoints; give one each, or none")
    if len(set(given)) < len(given):
        raise UserError("two models cannot have the same --name")
    if not all(name and len(name) <= 256 and name.isprintable() for name in given):
        raise UserError(
            "a --name must not be empty, longer than 256 letters, or have signs that cannot be seen"
        )
    return given
