"""A worker process: `python -m kick.sweep.executors.worker`, started by the local executor.

Reads a job and then works from stdin, one JSON object a line, and says on stdout what it is at. Ends at once, with its
children, when stdin is closed: then nobody waits for it any more.
"""

import json
import os
import queue
import signal
import sys
import threading
from typing import Any

from kick.cli import quieten_libraries


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print is not an answer
    messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(messages,), daemon=True).start()
    quieten_libraries()

    def say(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    from kick.errors import KickError
    from kick.sweep.executors.base import Job
    from kick.sweep.executors.site import Site
    from kick.sweep.work import Work

    site: Site | None = None
    job = Job(**messages.get()["job"])
    while True:
        work = Work.from_json(messages.get()["work"])
        try:
            site = site or Site.of(job, sys.stderr)
            for _ in site.carry_out(work, Teller(say)):
                pass
            say(ended=True)
        except KickError as error:  # what one evaluation can do wrong is recorded: this concerns all of them
            say(fatal=[error.message, error.hint])


def _listen(messages: "queue.SimpleQueue[dict[str, Any]]") -> None:
    for line in sys.stdin:
        messages.put(json.loads(line))
    os.killpg(0, signal.SIGKILL)  # this process leads its group


class Teller:
    """A watch that says everything to the process that started this one."""

    def __init__(self, say: Any) -> None:
        self._say = say

    def make(self, setting: str, how: str) -> None:
        self._tell("make", setting, how)

    def show(self, done: int, total: int, what: str, detail: str = "") -> None:
        self._tell("show", done, total, what, detail)

    def made(self) -> None:
        self._tell("made")

    def ask(self, setting: str, suite: str, questions: int) -> None:
        self._tell("ask", setting, suite, questions)

    def skip(self, count: int) -> None:
        self._tell("skip", count)

    def advance(self, count: int) -> None:
        self._tell("advance", count)

    def stop(self) -> None:
        self._tell("stop")

    def note(self, message: str) -> None:
        self._tell("note", message)

    def _tell(self, method: str, *arguments: Any) -> None:
        self._say(watch=method, arguments=arguments)


if __name__ == "__main__":
    main()
