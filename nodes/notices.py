"""What this pack says in the server's log as a warning, said in the page as well (`web/lookahead.js` shows it)."""

from __future__ import annotations

import logging

MARK = "[LCM-Lookahead] "
EVENT = "lookahead_notice"  # a frozen name: web/lookahead.js listens for it


class PageHandler(logging.Handler):
    """Hands warnings that begin with MARK to every page that is open."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if not text.startswith(MARK):
            return
        try:
            from server import PromptServer  # the host's; there is none where nodes run without a server

            PromptServer.instance.send_sync(EVENT, {"text": text.removeprefix(MARK)})
        except (ImportError, AttributeError):
            return
        except Exception:
            self.handleError(record)


def tell_the_page() -> None:
    """Attach the handler to the root logger, once a process."""
    root = logging.getLogger()
    if not any(type(handler).__name__ == PageHandler.__name__ for handler in root.handlers):
        root.addHandler(PageHandler())
