"""CNI errors: a code the runtime understands, and words for the person who reads its log.

Codes 1 to 99 are the specification's (1.1.0, section 5 "Error"), from 100 on ours. 11 asks the
runtime to try again later; 50 and 51 answer STATUS. A delegated plugin's code is passed on as is.
"""

from __future__ import annotations

from enum import IntEnum


class Code(IntEnum):
    """What kind of failure."""

    INCOMPATIBLE_VERSION = 1
    UNSUPPORTED_FIELD = 2
    UNKNOWN_CONTAINER = 3
    INVALID_ENVIRONMENT = 4
    DECODING_FAILURE = 6
    INVALID_NETWORK_CONFIG = 7
    TRY_AGAIN_LATER = 11
    NOT_AVAILABLE = 50
    LIMITED = 51
    NO_ADDRESS = 100
    WIRING_FAILED = 101
    CHECK_FAILED = 103
    GC_INCOMPLETE = 104
    INTERNAL = 199


class CniError(Exception):
    """A call that failed. `details` may be empty."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(f"{message}: {details}" if details else message)
        self.code = code
        self.message = message
        self.details = details


def try_again(message: str, details: str = "") -> CniError:
    """The failure of something that will come back by itself."""
    return CniError(Code.TRY_AGAIN_LATER, message, details)
