"""Options of gRPC servers and channels, for every process."""

from __future__ import annotations

Options = list[tuple[str, int | str]]

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Longest message between our own processes, and longest response: the longest prompt as token ids fits."""

SMALL_MESSAGE_BYTES = 64 * 1024
"""Longest request of a service that takes no prompts."""

_KEEPALIVE: Options = [
    ("grpc.keepalive_permit_without_calls", 1),
    # A client may ping through a long, silent prefill. The key has "http2" in it: the one without
    # is ignored by gRPC core, and then pings end calls with "too many pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_pings_without_data", 0),
]
_HANDSHAKE_MS = 20_000
_OUR_PINGS: Options = [("grpc.http2.max_ping_strikes", 0)]  # our processes may ping each other as they like


def _messages(max_receive_bytes: int) -> Options:
    return [
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ]


def _server(max_receive_bytes: int) -> Options:
    """Return what servers have in common. A second server on the same port fails instead of sharing it."""
    return [("grpc.so_reuseport", 0), ("grpc.keepalive_time_ms", 30_000), *_KEEPALIVE, *_messages(max_receive_bytes)]


def server_options() -> Options:
    """Return the options of a server for our own processes."""
    return [*_server(MAX_MESSAGE_BYTES), *_OUR_PINGS]


def public_server_options(
    max_receive_bytes: int, max_concurrent_streams: int, max_connection_age_s: int = 0
) -> Options:
    """Return the options of a server for anybody.

    max_receive_bytes     longest request
    max_connection_age_s  makes clients connect again, so that new replicas get their share; calls that run then have
                          an hour to end. 0: never
    """
    options: Options = [
        *_server(max_receive_bytes),
        ("grpc.max_concurrent_streams", max_concurrent_streams),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),  # TLS and the first frame; gRPC would wait for two minutes
        ("grpc.http2.max_ping_strikes", 10),  # pings within a second of the last one, with nothing sent between
        # Without it gRPC takes megabytes of requests that nobody reads yet; those that are read come as fast.
        ("grpc.http2.bdp_probe", 0),
    ]
    if max_connection_age_s:
        options.append(("grpc.max_connection_age_ms", max_connection_age_s * 1000))
        options.append(("grpc.max_connection_age_grace_ms", 3_600_000))
    return options


def hop_channel_options() -> Options:
    """Return the options of a channel between two of our processes.

    A dead peer is noticed within ten seconds, and a restarted one is connected to within one.
    """
    return [
        ("grpc.keepalive_time_ms", 5_000),
        ("grpc.keepalive_timeout_ms", 5_000),  # without a word of the peer; whatever it says counts,
        ("grpc.http2.ping_timeout_ms", 5_000),  # so this is for one that speaks and does not hear
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.use_local_subchannel_pool", 1),
        *_KEEPALIVE,
        *_OUR_PINGS,
        *_messages(MAX_MESSAGE_BYTES),
    ]
