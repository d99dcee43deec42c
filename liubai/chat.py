"""Questions to a checkpoint in the terminal, answered as the server answers them.

Lines that begin with ``/`` change how; ``/help`` lists them. Every question stands alone unless ``/keep on``.
Ctrl-C stops an answer; twice, or Ctrl-D, leaves.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from liubai.errors import UserError
from liubai.grade import sandbox
from liubai.model.checkpoint import load
from liubai.rollout.local import LocalWriter
from liubai.rollout.paths import PathsConfig
from liubai.rollout.torch_engine import TorchEngine
from liubai.seeds import derive
from liubai.serve.answering import answer
from liubai.serve.asking import prepared
from liubai.serve.errors import Refused, refusal_of
from liubai.serve.events import ChoiceSaid, Ended, Event, PathSaid, Started
from liubai.serve.house import House, Served, names_of, token_bytes
from liubai.serve.limits import Limits
from liubai.serve.router import ROUTES, Router
from liubai.serve.schema import ChatRequest, bounded, read
from liubai.serve.tools import check
from liubai.stages.by_paths import judges_of, way_of
from liubai.stages.config import Compute
from liubai.text.template import template_for

#: Tokens of a prompt, for which room is kept beside the answer's.
PROMPT = 2048
#: What is asked to see whether anything could be: a question whose steps a process model finds.
TRIAL = "3 7 8 ->13"
#: Answers written at once: paths.
SLOTS = 64
#: Seconds between two looks at how far a search is.
OFTEN_S = 0.1
#: Signs that a terminal obeys instead of showing them, and what stands for each.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
CONTROLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)

HELP = """\
/think on|off        DeepThink: think before the answer
/budget N|none       the most tokens of a thought
/atleast N|none      the fewest: think longer
/paths KIND[:N[:BY]] greedy, sample, beam:4, vote:8, tree:16:rollouts; with --judge: best:8
/route WAY           auto, fast, think, tool, none
/tools NAMES|none    that the model may call: calculator, python
/temperature T       0 is greedy
/tokens N            the longest answer
/seed N              decides every random draw, from the next question on
/show on|off         show the thought
/keep on|off         a conversation, begun anew: from now on, earlier questions and answers are read again
/settings            what is set
/quit                or Ctrl-D"""


@dataclass(slots=True)
class Settings:
    """What the commands change; the names are theirs."""

    temperature: float = 0.6
    max_tokens: int = 1024
    think: bool = True
    budget: int | None = None
    at_least: int = 0
    paths: str = "sample"
    route: str | None = None
    tools: tuple[str, ...] = ()
    show: bool = True
    keep: bool = False
    seed: int = 0

    def set(self, command: str, text: str) -> str | None:
        """Set one by its command; a sentence when that cannot be."""
        try:
            return self._set(command, text.strip())
        except (UserError, ValueError) as error:
            return str(error)

    def _set(self, command: str, text: str) -> str | None:
        if command in ("think", "show", "keep"):
            if text not in ("on", "off"):
                return f"say /{command} on, or /{command} off"
            setattr(self, command, text == "on")
        elif command == "budget":
            self.budget = None if text == "none" else _natural(text)
        elif command == "atleast":
            self.at_least = 0 if text == "none" else _natural(text)
        elif command == "tokens":
            self.max_tokens = max(1, _natural(text))
        elif command == "seed":
            self.seed = _natural(text)
        elif command == "temperature":
            self.temperature = _temperature(text)
        elif command == "paths":
            bounded(PathsConfig.parse(text))
            self.paths = text
        elif command == "route":
            if text not in (*ROUTES, "none"):
                return f"say one of {', '.join(ROUTES)}, none"
            self.route = None if text == "none" else text
        elif command == "tools":
            names = tuple(name for name in text.replace(",", " ").split() if name != "none")
            check(names)
            self.tools = names
        else:
            return f"there is no command /{command}; /help lists them"
        return None

    def described(self) -> str:
        shown = {
            "think": "on" if self.think else "off",
            "budget": "none" if self.budget is None else self.budget,
            "atleast": self.at_least,
            "paths": self.paths,
            "route": self.route or "none",
            "tools": ", ".join(self.tools) or "none",
            "temperature": f"{self.temperature:g}",
            "tokens": self.max_tokens,
            "seed": self.seed,
            "show": "on" if self.show else "off",
            "keep": "on" if self.keep else "off",
        }
        return "\n".join(f"/{name} {value}" for name, value in shown.items())

    def request(self, messages: Sequence[dict[str, Any]], turn: int) -> ChatRequest:
        """Raises ``Refused``."""
        asked = {
            "messages": list(messages),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "thinking": self.think,
            "thinking_budget": self.budget,
            "think_at_least": self.at_least or None,
            "paths": self.paths,
            "route": self.route,
            "use_tools": list(self.tools) or None,
            "seed": derive(self.seed, "chat", turn),
        }
        return read(ChatRequest, asked)


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UserError(f"'{text}' is no whole number")
    return int(text)


def _temperature(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 2:
        raise UserError("a temperature is a number from 0 to 2")
    return number


def talk(checkpoint: Path, compute: Compute, settings: Settings, judges: Sequence[Path] = ()) -> None:
    """Until Ctrl-D, Ctrl-C twice, or /quit. Raises ``UserError`` for a bad checkpoint or judge."""
    device = compute.where()
    model, tokenizer = load(checkpoint, dtype=compute.dtype(), device=device)
    template = template_for(tokenizer, checkpoint)
    room = min(model.config.max_position_embeddings, settings.max_tokens + PROMPT)
    engine = TorchEngine(model, eos_ids=tokenizer.eos_ids, slots=SLOTS, max_length=room, lot=1)
    engine.load(model.state_dict(), version=0)
    way = way_of("sample", judges)
    found = judges_of({} if way is None else way.judges, None, device)
    writer = LocalWriter(engine, eos_ids=tokenizer.eos_ids, judges=found)
    served = Served(
        names_of([checkpoint])[0], writer, tokenizer, template, room, token_bytes=token_bytes(model.config)
    )
    terminal = Terminal(house_of(served), writer, settings)
    if (wrong := terminal.wrong()) is not None:
        raise UserError(wrong)
    terminal.run()


def house_of(served: Served) -> House:
    """The one model, which may write as many answers at once as it has slots."""
    given = "; start with --judge DIR to give one"
    return House([served], Limits(answers=SLOTS), router=Router.load(), judges_by=given)


@dataclass(slots=True)
class Terminal:
    house: House
    writer: LocalWriter
    settings: Settings
    turn: int = 0
    interactive: bool = True
    said: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> None:
        interrupted = False
        # another program gets the answers alone
        self.interactive = sys.stdin.isatty()
        prompt = "> " if self.interactive and sys.stdout.isatty() else ""
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                if prompt:
                    print()
                return
            except KeyboardInterrupt:
                print()
                if interrupted:
                    return
                interrupted = True
                print("Ctrl-C again, or Ctrl-D, leaves", file=sys.stderr)
                continue
            interrupted = False
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                interrupted = not self.ask(line)

    def command(self, line: str) -> None:
        name, _, text = line[1:].partition(" ")
        if name == "help":
            print(HELP)
        elif name == "settings":
            print(self.settings.described())
        elif (wrong := self.set(name, text)) is not None:
            if not self.interactive:  # what follows would be answered otherwise than it was meant
                raise UserError(f"{line}: {wrong}")
            print(wrong, file=sys.stderr)
        elif name == "keep":
            self.said.clear()
            if self.settings.keep:
                print("a conversation begins with the next question; nothing before it is read again")
        elif name == "seed":
            self.turn = 0

    def set(self, command: str, text: str) -> str | None:
        """Set it, unless no question could then be answered: a sentence why."""
        before = replace(self.settings)
        wrong = self.settings.set(command, text) or self._too_long(command) or self.wrong()
        if wrong is not None:
            self.settings = before
        return wrong

    def _too_long(self, command: str) -> str | None:
        """Room is made at the start, and an answer would be cut to it."""
        room = self.house.find(None).max_length
        if command != "tokens" or self.settings.max_tokens < room:
            return None
        return (
            f"there is room for {room} tokens, with the question; start with "
            f"--max-tokens {self.settings.max_tokens} for more, as far as the model goes"
        )

    def wrong(self) -> str | None:
        """Why no question can be answered as things are set, if that is so."""
        try:
            if "python" in self.settings.tools:
                sandbox.require()
            asked = [{"role": "user", "content": TRIAL}]
            asyncio.run(prepared(self.house, self.settings.request(asked, 0), None))
        except (Refused, UserError) as error:
            return refusal_of(error).message
        return None

    def ask(self, question: str) -> bool:
        """Answer it; ``False`` when Ctrl-C stopped that."""
        asked = [*self.said, {"role": "user", "content": question}]
        screen = Screen(self.settings.show)
        try:
            asyncio.run(self._answer(self.settings.request(asked, self.turn), screen))
        except KeyboardInterrupt:
            screen.stopped()
            return False
        except (Refused, UserError) as error:
            print(refusal_of(error).message, file=sys.stderr)
            return True
        self.turn += 1
        if self.settings.keep:
            self.said = [*asked, {"role": "assistant", "content": screen.content}]
        return True

    async def _answer(self, request: ChatRequest, screen: Screen) -> None:
        serving = asyncio.create_task(self.writer.serve())
        try:
            async with aclosing(answer(self.house, request)) as events:
                async for event in events:
                    screen.show(event)
        finally:
            serving.cancel()
            with suppress(asyncio.CancelledError):
                await serving


class Screen:
    """An answer as it grows: the thought dimmed (or not at all), the answer, and then what there was to
    it."""

    def __init__(self, thought: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.thought, self.clock = thought, clock
        self.dim, self.plain = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
        self.content = ""
        self._began, self._looked, self._paths = clock(), -OFTEN_S, 0
        self._line = self._thinks = self._said = False

    def show(self, event: Event) -> None:
        if isinstance(event, Started) and event.route is not None:
            self._note(f"{event.route['way']}: {event.route['why']}")
        elif isinstance(event, PathSaid):
            self._path(event.path)
        elif isinstance(event, ChoiceSaid) and event.kind == "reasoning":
            self._think(event.text)
        elif isinstance(event, ChoiceSaid):
            self._close()
            self.content += event.text
            self._print(self._safe(event.text))
        elif isinstance(event, Ended):
            self._close()
            self._new_line()
            if not self._said:
                print(flush=True)  # an answer is a line, also when there is nothing in it
            self._sum_up(event.summary or {}, event.finish)

    def stopped(self) -> None:
        self._new_line()
        self._note("stopped")

    def _path(self, path: int) -> None:
        """A search is long: say how far it is, where that does not spoil what is read later."""
        self._paths = max(self._paths, path + 1)
        if self.clock() - self._looked >= OFTEN_S:
            self._how_far()

    def _how_far(self) -> None:
        self._looked = self.clock()
        if self.dim and self._paths:
            paths = "1 path" if self._paths == 1 else f"{self._paths} paths"
            self._print(f"\r{self.dim}{paths}, {self._looked - self._began:.1f} s{self.plain}")

    def _think(self, text: str) -> None:
        if not self._thinks and self._paths and self.dim:
            self._how_far()
            self._new_line()
        if self.thought:
            self._print(f"{self.dim}{self._safe(text)}{self.plain}")
        elif not self._thinks and self.dim:
            self._note("thinking…")
        self._thinks = True

    def _close(self) -> None:
        """The thought is over, or the search."""
        if not self._thinks:
            self._how_far()
        if (self._thinks and self.thought) or self._paths:
            self._new_line()
        self._thinks, self._paths = False, 0

    def _sum_up(self, summary: dict[str, Any], finish: str) -> None:
        for tool in summary.get("tools", ()):
            self._note(f"{tool['name']}: {tool['input']} → {tool['output']}")
        thinking, paths = summary.get("thinking", {}), summary.get("paths", {})
        said = []
        if thinking.get("tokens"):
            closed = ", closed by its budget" if thinking["forced"] else ""
            said.append(f"thought {thinking['tokens']} tokens, {thinking['seconds']:.1f} s{closed}")
        listed = paths.get("list", ())
        if len(listed) > 1:
            best = listed[paths["chosen"]]
            weight = ""
            if best["votes"] is not None:
                weight = f", {best['votes']} {'vote' if best['votes'] == 1 else 'votes'}"
            elif best["score"] is not None:
                weight = f", score {best['score']:.3g}"
            said.append(f"path {paths['chosen'] + 1} of {len(listed)}{weight}, {paths['tokens']} tokens")
        if finish == "length":
            said.append("cut off: it had no more tokens")
        if said:
            self._note("; ".join(said))

    def _note(self, text: str) -> None:
        """For a reader at the terminal; another program is given the answer alone."""
        self._new_line()
        if self.dim:
            print(f"{self.dim}[{self._safe(text)}]{self.plain}", flush=True)

    def _safe(self, text: str) -> str:
        """What a model wrote must not move the cursor or name the window; another program is given all."""
        return text.translate(CONTROLS) if self.dim else text

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)
        self._line, self._said = not text.endswith("\n"), True

    def _new_line(self) -> None:
        if self._line:
            print(flush=True)
        self._line = False
