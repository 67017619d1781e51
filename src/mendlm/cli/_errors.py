"""Every way a command can end, in one place: exit codes and the sentence on stderr."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import typer

from mendlm.cli._console import console_for, safe
from mendlm.errors import MendError

OK, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130

# The parser's base exception: click's ClickException, which typer vendors since 0.26.
_ParseError = cast("type[Exception]", typer.BadParameter.__mro__[2])


@dataclass
class Session:
    """What the end of a run needs to know about its beginning.

    Attributes
    ----------
    traceback : show Python tracebacks.
    interrupt_hint : what to tell the user after Ctrl-C, beyond "interrupted".
    """

    traceback: bool = False
    interrupt_hint: str = ""


def run(command: Any, argv: Sequence[str], session: Session) -> int:
    """Run the parser's `command` on `argv` and return the exit code; no exception leaves this function."""
    _prepare_streams()
    session.traceback = os.environ.get("MENDLM_TRACEBACK", "") not in ("", "0")
    try:
        code = command.main(args=list(argv), prog_name="mendlm", standalone_mode=False, obj=session)
        sys.stdout.flush()
    except _ParseError as err:
        return _wrong_use(err)
    except MendError as err:
        return _fail(str(err), err.exit_code, session)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(session)
    except BrokenPipeError:
        return _broken_pipe()
    except SystemExit as err:  # typer's own answer to a closed pipe
        return err.code if isinstance(err.code, int) else FAILED
    except OSError as err:
        return _fail(_os_error_text(err), FAILED, session)
    except MemoryError:
        return _fail("out of memory. Use a smaller --seqlen, or a machine with more memory.", FAILED, session)
    except Exception as err:  # noqa: BLE001 - the last frame of the program: a bug becomes a sentence and exit code 1
        return _fail(_unexpected_text(err, session), FAILED, session)
    # typer answers Ctrl-C with this code instead of an exception.
    return _interrupted(session) if code == INTERRUPTED else int(code or OK)


def _prepare_streams() -> None:
    """Names of files may hold bytes the terminal's encoding lacks: show '?' instead of failing.

    Where a stream is closed (``>&-``) Python has None, which nothing can be written to.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    console_for(sys.stderr).print(f"warning: {safe(message)}", soft_wrap=True)


def _fail(message: str, code: int, session: Session) -> int:
    if session.traceback:
        traceback.print_exc()
    console = console_for(sys.stderr)
    console.print("error: ", style="bold red", end="")
    console.print("\n".join(safe(line) for line in message.split("\n")), soft_wrap=True)
    return code


def _wrong_use(err: Exception) -> int:
    if type(err).__name__ == "NoArgsIsHelpError":  # `mendlm` alone: the help has been printed
        return WRONG_USE
    message = cast("Any", err).format_message()
    context = getattr(err, "ctx", None)
    hint = f" Try: {context.command_path} --help" if context is not None else ""
    end = "" if message.endswith((".", "?", ")")) else "."
    return _fail(f"{message}{end}{hint}", getattr(err, "exit_code", WRONG_USE), Session())


def _interrupted(session: Session) -> int:
    hint = f" {session.interrupt_hint}" if session.interrupt_hint else ""
    console_for(sys.stderr).print(f"interrupted.{safe(hint)}", soft_wrap=True)
    return INTERRUPTED


def _broken_pipe() -> int:
    # The interpreter flushes stdout once more at exit: give it a place to write to.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED


def _os_error_text(err: OSError) -> str:
    reason = err.strerror or str(err)
    return f"{reason}: {str(err.filename)!r}." if err.filename is not None else f"{reason}."


def _unexpected_text(err: Exception, session: Session) -> str:
    first = str(err).strip().split("\n")[0]
    hint = "" if session.traceback else " This is a bug in mendlm or a library; MENDLM_TRACEBACK=1 shows where."
    return f"{type(err).__name__}: {first}{hint if first.endswith(('.', '!')) else '.' + hint}"
