"""Every error that tunefleet raises on purpose.

::

    TunefleetError
     ├─ ConfigError            an option or its combination is wrong
     ├─ RequestInvalid         a request says something that can't be done
     ├─ AuthError              no credential, or one that may not do this
     ├─ AdapterError
     │   ├─ AdapterNotFound    no such user, adapter or version
     │   ├─ AdapterInvalid     an upload that can't be served, with the field or tensor and why
     │   ├─ AdapterConflict    the catalog moved on, or the change makes no sense now
     │   └─ AdapterLoadFailed  a stored adapter could not be brought to a device
     ├─ BaseModelError         the base model can't be found, prepared or served
     ├─ StoreError             objects or catalog out of reach, or a copy that is not what was stored
     ├─ CapacityError          a bounded queue or budget is full: try again after ``retry_after_s``
     └─ ReplicaError           the engine side failed
    InvalidState               misuse by our own code; not part of the tree

The message says what to do next; ``code`` is stable and machine readable; ``param`` names the field, tensor
or part.
"""

from __future__ import annotations

from typing import ClassVar


class TunefleetError(Exception):
    """Root of the tree.

    Attributes:
        message: what is wrong and what to do, fit for the caller's eyes.
        code: stable machine-readable name, e.g. ``adapter_not_found``.
        param: the field, tensor, part or parameter at fault, if there is one.
    """

    default_code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param


class ConfigError(TunefleetError):
    default_code = "invalid_config"


class RequestInvalid(TunefleetError):
    default_code = "invalid_request"


class AuthError(TunefleetError):
    """``code`` is ``unauthenticated`` (HTTP 401) or ``forbidden`` (403)."""

    default_code = "unauthenticated"


class AdapterError(TunefleetError):
    default_code = "adapter_error"


class AdapterNotFound(AdapterError):
    """``fallback`` is the user's own setting (``none``, ``base``), if there is such a user and it is set."""

    default_code = "adapter_not_found"

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, fallback: str | None = None
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.fallback = fallback


class AdapterInvalid(AdapterError):
    default_code = "adapter_invalid"


class AdapterConflict(AdapterError):
    default_code = "conflict"


class AdapterLoadFailed(AdapterError):
    default_code = "adapter_load_failed"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.retry_after_s = retry_after_s


class BaseModelError(TunefleetError):
    default_code = "base_model_error"


class StoreError(TunefleetError):
    default_code = "store_error"


class CapacityError(TunefleetError):
    default_code = "over_capacity"

    def __init__(
        self, message: str, *, retry_after_s: float, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.retry_after_s = retry_after_s


class ReplicaError(TunefleetError):
    default_code = "replica_error"


class InvalidState(RuntimeError):
    """Our own code called something in the wrong order."""
