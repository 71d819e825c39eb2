"""The HTTP session of S3 clients: botocore's, with a least rate on every connection (`runtime/least_rate.py`)."""

import os
from typing import Any

from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)
from botocore.client import BaseClient
from botocore.httpsession import URLLib3Session
from botocore.session import get_session
from botocore.utils import get_environ_proxies

from ropeway.runtime.least_rate import LeastRateSocket


class _Connection(AWSHTTPConnection):  # type: ignore[misc]  # botocore has no types
    def connect(self) -> None:
        super().connect()
        self.sock: Any = LeastRateSocket(self.sock)


class _TlsConnection(AWSHTTPSConnection):  # type: ignore[misc]
    def connect(self) -> None:
        super().connect()
        self.sock: Any = LeastRateSocket(self.sock)


class _Pool(AWSHTTPConnectionPool):  # type: ignore[misc]
    ConnectionCls = _Connection


class _TlsPool(AWSHTTPSConnectionPool):  # type: ignore[misc]
    ConnectionCls = _TlsConnection


class BoundedSession(URLLib3Session):  # type: ignore[misc]
    """A session with the settings of a client, as its endpoint would open it. Shared by threads."""

    def __init__(self, client: BaseClient) -> None:
        """Take timeouts and the number of connections from the client, proxies and CA file from the environment."""
        config = client.meta.config
        super().__init__(
            verify=get_session().get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE") or True,
            proxies=get_environ_proxies(client.meta.endpoint_url),
            timeout=(config.connect_timeout, config.read_timeout),
            max_pool_connections=config.max_pool_connections,
        )
        self._pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
        self._manager.pool_classes_by_scheme = self._pool_classes_by_scheme
