"""Media behind URLs, where that is allowed; the server's own network is out of reach.

A host must be on the list; all addresses that it resolves to must be public, and the connection
goes to the very address that was checked (a second look-up could give another). Redirects are not
followed, proxies of the environment not used, compressed answers not asked for, and bytes and
seconds are limited.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import httpx2

from mmllm.server.errors import ApiError, bad_request
from mmllm.server.settings import ServerSettings

_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
"""NAT64: an IPv4 address, maybe a private one, in the clothes of IPv6."""
_PORTS = {"http": 80, "https": 443}


async def fetch(url: str, settings: ServerSettings, param: str) -> bytes:
    """The bytes behind a URL. Raises ApiError (400) that names `param`."""
    where = _checked(url, settings, param)
    limit = settings.input_limits.bytes
    try:
        async with asyncio.timeout(settings.fetch_timeout):
            address = await _address(where, param)
            async with (
                httpx2.AsyncClient(trust_env=False, timeout=settings.fetch_timeout) as client,
                client.stream(
                    "GET",
                    where.copy_with(host=address),
                    headers={"host": where.netloc.decode("ascii"), "accept-encoding": "identity"},
                    extensions={"sni_hostname": where.raw_host.decode("ascii")},
                    follow_redirects=False,
                ) as response,
            ):
                if response.status_code != 200:
                    raise _refused(
                        f"the server there answers {response.status_code}, not 200 (redirects are "
                        "not followed)",
                        param,
                    )
                found = bytearray()
                async for chunk in response.aiter_raw():
                    found += chunk
                    if len(found) > limit:
                        raise _refused(f"more than {limit} bytes", param)
                return bytes(found)
    except TimeoutError as error:
        raise _refused(f"not read within {settings.fetch_timeout:g} s", param) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        raise _refused("it cannot be fetched", param) from error


def is_public(address: str) -> bool:
    """Whether an IP address, or the IPv4 address inside it, belongs to the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _TRANSLATED or ip.sixtofour or ip.teredo:
            return False
        ip = ip.ipv4_mapped or ip
    return ip.is_global and not ip.is_multicast


def _checked(url: str, settings: ServerSettings, param: str) -> httpx2.URL:
    """The URL, if its host is on the list."""
    if not settings.allow_urls:
        raise _refused("this server fetches no URLs: send the medium as a data: URI", param)
    try:
        where = httpx2.URL(url)
        default = _PORTS[where.scheme]
        host = where.raw_host.decode("ascii")
        port = where.port or default
    except (httpx2.InvalidURL, KeyError, ValueError) as error:
        raise _refused("expected a data: URI or an http(s) URL", param) from error
    if where.userinfo:
        raise _refused("a URL with a user name is not fetched", param)
    if (host if port == default else f"{host}:{port}") not in settings.allow_urls:
        raise _refused("its host is not one that this server may fetch from", param)
    return where


async def _address(where: httpx2.URL, param: str) -> str:
    """Return the address of a host. Raises ApiError unless all of its addresses are public."""
    loop = asyncio.get_running_loop()
    host, port = where.raw_host.decode("ascii"), where.port or _PORTS[where.scheme]
    found = await loop.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise _refused("its host is not on the public internet", param)
    return addresses[0]


def _refused(why: str, param: str) -> ApiError:
    return bad_request(f"{param}: {why}", param, "invalid_url")
