"""Logging: constant events with named fields, to standard error, by structlog.

People at a terminal get coloured lines, everything else JSON, unless `log_format` says otherwise.
Libraries that use the standard `logging` come out the same way.
"""

from __future__ import annotations

import logging
import sys

import structlog

from cymric.runtime.settings import Settings


class _Threshold:
    """Drops what is less than the level, which may change while the process runs."""

    def __init__(self) -> None:
        self.number = logging.INFO

    def __call__(
        self, _: object, method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        if _NUMBER_BY_METHOD.get(method, logging.CRITICAL) < self.number:
            raise structlog.DropEvent
        return event


_NUMBER_BY_METHOD = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_threshold = _Threshold()


def set_level(name: str) -> None:
    """Log from now on what is at least `debug`, `info`, `warning` or `error`."""
    _threshold.number = logging.getLevelNamesMapping()[name.upper()]
    logging.getLogger().setLevel(max(_threshold.number, logging.WARNING))


def configure(settings: Settings, daemon: str) -> None:
    """Set up structlog and `logging` for this process; `daemon` is on every line."""
    is_console = settings.log_format == "console" or (
        settings.log_format == "auto" and sys.stderr.isatty()
    )
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if is_console
        else structlog.processors.JSONRenderer()
    )
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[_threshold, *shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=shared,
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(settings.log_level)
    structlog.contextvars.bind_contextvars(daemon=daemon, node=settings.node_name)
