"""Keeps pytest's handlers at the root logger alone, where the records of all loggers then arrive.

pytest adds two handlers to every logger that passes nothing on, in each phase of each test. torch and
transformers have 43 such loggers, at a third of an empty test's time.

    config.pluginmanager.register(Loggers())
"""

from __future__ import annotations

import logging


class Loggers:
    """Let every logger that exists once tests are found pass its records on."""

    def pytest_collection_finish(self) -> None:
        for logger in logging.root.manager.loggerDict.values():
            if isinstance(logger, logging.Logger):
                logger.propagate = True
