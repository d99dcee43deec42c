"""``liubai chat``: the same answers as the server's, in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from liubai.errors import UserError


def chat(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint folder, or a hub id.")],
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.6,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 1024,
    think: Annotated[bool, typer.Option(help="DeepThink: think before the answer.")] = True,
    budget: Annotated[int | None, typer.Option(min=0, help="The most tokens of a thought.")] = None,
    at_least: Annotated[int, typer.Option(min=0, help="The fewest: think longer.")] = 0,
    paths: Annotated[
        str,
        typer.Option(
            metavar="KIND[:N[:BY]]",
            help="greedy, sample, beam:4, vote:8, tree:16:rollouts; with --judge: best:8.",
        ),
    ] = "sample",
    judge: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A reward or process model for best and tree; may be repeated."),
    ] = None,
    route: Annotated[
        Literal["auto", "fast", "think", "tool", "none"], typer.Option(help="Who answers.")
    ] = "none",
    tools: Annotated[
        str, typer.Option(metavar="NAMES", help="That the model may call: calculator, python, or both.")
    ] = "",
    show_thinking: Annotated[bool, typer.Option(help="Show the thought, dimmed.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Decides every random draw.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Ask a checkpoint questions. /help lists what can be changed meanwhile; Ctrl-D leaves."""
    from liubai.commands.shared import checkpoint_folder, compute_of

    checkpoint = checkpoint_folder(checkpoint)
    compute = compute_of(device)
    from liubai.chat import Settings, talk

    settings = Settings(
        temperature=temperature,
        max_tokens=max_tokens,
        think=think,
        budget=budget,
        at_least=at_least,
        paths=paths,
        route=None if route == "none" else route,
        show=show_thinking,
        seed=seed,
    )
    for command, text in (("paths", paths), ("tools", tools)):
        if (wrong := settings.set(command, text)) is not None:
            raise UserError(f"--{command} {wrong}")
    talk(checkpoint, compute, settings, judge or [])
