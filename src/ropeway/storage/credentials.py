"""AWS credentials that are read again when the server says that they expired.

boto3 refreshes credentials that state when they expire (`credential_process`, container and instance endpoints, SSO).
It never reads the shared credentials file or the profile again, so a long upload would end although a tool has written
new keys. Here a refused request loads the credentials once more; if they differ, it is signed and sent again.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from weakref import WeakKeyDictionary

from botocore.client import BaseClient
from botocore.credentials import CredentialProvider, Credentials, ReadOnlyCredentials
from botocore.exceptions import CredentialRetrievalError, NoCredentialsError
from botocore.session import Session, get_session

from ropeway.storage.s3_client import EXPIRED_CODES

_RELOAD_CODES = EXPIRED_CODES | {"InvalidAccessKeyId", "InvalidToken", "InvalidClientTokenId"}  # a removed key, too
# A response to HEAD has no body, so its code is the status. Amazon S3 answers an expired token with 400.
_HEAD_CODES = frozenset(
    str(int(one)) for one in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
)
_GENERATION = "ropeway_credentials"
_of_clients: "WeakKeyDictionary[BaseClient, RenewedCredentials]" = WeakKeyDictionary()


class RenewedCredentials(Credentials):  # type: ignore[misc]  # botocore has no types
    """The credentials of a client, as botocore finds them; `renew` finds them again. Shared by threads."""

    def __init__(self, found: Credentials) -> None:
        """Start with the credentials that were found."""
        self._found = found
        self._lock = threading.Lock()
        self.method = found.method
        self.generation = 0

    @property
    def access_key(self) -> str:
        """The current access key."""
        return str(self.get_frozen_credentials().access_key)

    @property
    def secret_key(self) -> str:
        """The current secret key."""
        return str(self.get_frozen_credentials().secret_key)

    @property
    def token(self) -> str | None:
        """The current session token."""
        token: str | None = self.get_frozen_credentials().token
        return token

    @property
    def account_id(self) -> str | None:
        """The account, if the source of the credentials states it."""
        account: str | None = self.get_frozen_credentials().account_id
        return account

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """Return the current keys; botocore refreshes those that state when they expire.

        Raises:
            CredentialRetrievalError: Their source fails, or gives keys that have expired.
        """
        return _freeze(self._found)

    def get_deferred_property(self, property_name: str) -> Any:  # noqa: ANN401 - botocore has no types
        """Return a function that returns a current value."""
        return lambda: getattr(self, property_name)

    def renew(self, generation: int) -> bool:
        """Load the credentials again, unless a thread did since `generation`; return whether they are others now."""
        with self._lock:
            if self.generation != generation:
                return True
            found = _find()
            if found is None or _freeze(found) == self.get_frozen_credentials():
                return False
            self._found, self.generation = found, generation + 1
            return True


def _find() -> Credentials | None:
    """Return the credentials that a new session finds: it reads environment, profile and files again."""
    with _source_errors("AWS_PROFILE"):
        return get_session().get_credentials()


def _freeze(found: Credentials) -> ReadOnlyCredentials:
    with _source_errors(found.method):
        return found.get_frozen_credentials()


@contextmanager
def _source_errors(source: str) -> Iterator[None]:
    """Name a source that answers nonsense, or keys that are expired after a refresh: botocore has no error for it."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise CredentialRetrievalError(provider=source, error_msg=type(error).__name__) from error


class _Provider(CredentialProvider):  # type: ignore[misc]
    METHOD = "ropeway"

    def __init__(self) -> None:
        self.credentials: RenewedCredentials | None = None

    def load(self) -> RenewedCredentials | None:
        """Return the credentials that a session of the environment finds."""
        if self.credentials is None and (found := _find()) is not None:
            self.credentials = RenewedCredentials(found)
        return self.credentials


def use_renewed(session: Session) -> _Provider:
    """Have a session's clients use credentials that `attach` renews; return their provider."""
    provider = _Provider()
    session.get_component("credential_provider").providers.insert(0, provider)
    return provider


def attach(client: BaseClient, provider: _Provider) -> None:
    """Have a client renew its credentials and repeat the request when a request is refused because of them."""
    credentials = provider.credentials
    if credentials is None:
        return
    _of_clients[client] = credentials

    def note(request: Any, **_: object) -> None:  # noqa: ANN401 - botocore has no types
        request.context[_GENERATION] = credentials.generation

    def renew(response: Any, request_dict: dict[str, Any], **_: object) -> float | None:  # noqa: ANN401
        code = "" if response is None else str(response[1].get("Error", {}).get("Code", ""))
        refused = code in _RELOAD_CODES or (request_dict["method"] == "HEAD" and code in _HEAD_CODES)
        return 0.0 if refused and credentials.renew(request_dict["context"][_GENERATION]) else None

    client.meta.events.register("before-sign.s3", note)
    client.meta.events.register_first("needs-retry.s3", renew)


def credentials_of(client: BaseClient) -> RenewedCredentials:
    """Return the credentials of a client; raise NoCredentialsError if it has none."""
    credentials = _of_clients.get(client)
    if credentials is None:
        raise NoCredentialsError
    return credentials
