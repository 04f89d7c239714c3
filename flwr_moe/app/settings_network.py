"""Settings of the network between server and nodes."""

from __future__ import annotations

from dataclasses import dataclass

from flwr_moe.app.spec import setting

LINKS = ("satellite", "wireless", "fixed", "trace", "real")
WIRE_DTYPES = ("float32", "bfloat16", "float16")
"""As in flwr_moe.network.wire_dtype, which brings torch with it."""
LOOPBACK = "127.0.0.1:0"
"""Where an exchange listens that is for nodes of the same machine: any free port."""


@dataclass(frozen=True)
class NetworkSettings:
    """Links, orbits, devices and the tensor exchange."""

    links: str = setting(
        "satellite",
        "the network between server and devices; real: nothing is simulated",
        choices=LINKS,
    )
    clock: str = setting(
        "virtual",
        "virtual: links are simulated; wall: they gate real sends, in real time",
        choices=("virtual", "wall"),
    )
    clock_speed: float = setting(
        1.0,
        "clock=wall: seconds of the pass table in a second; other than 1 for rehearsals",
        minimum=0,
        open_minimum=True,
    )
    wire_dtype: str = setting(
        "float32",
        "floats in Flower's messages; the halves are rounded, and take half the bytes",
        choices=WIRE_DTYPES,
    )
    exchange_url: str = setting(
        "",
        "tensor exchange of nodes whose node config names none; for one in the ServerApp its "
        "address as nodes reach it; empty: one in the ServerApp",
    )
    exchange_token: str = setting("", "token of the exchanges; empty: a random one")
    exchange_timeout_s: float = setting(
        5.0, "seconds after which an exchange counts as silent", minimum=0, open_minimum=True
    )
    exchange_listen: str = setting(
        LOOPBACK, "HOST:PORT of an exchange in the ServerApp; as it is, for nodes on its machine"
    )
    exchange_ssl_certfile: str = setting("", "its certificate chain as PEM, for TLS")
    exchange_ssl_keyfile: str = setting("", "its key as PEM")
    exchange_ssl_ca_certfile: str = setting(
        "", "nodes must show it a certificate signed by these, PEM; empty: the token will do"
    )
    constellation: str = setting("delta-4", "satellites: name of a preset")
    sites: str = setting(
        "", "LAT,LON of each cluster, by semicolons; empty: places on all continents"
    )
    start: str = setting("2026-01-01T00:00:00Z", "UTC time at which the run starts", is_time=True)
    min_elevation: float = setting(
        25.0, "lowest usable elevation, degrees", minimum=0, maximum=90, open_maximum=True
    )
    link_preset: str = setting(
        "handheld-s", "radio of the devices", choices=("handheld-s", "vsat-ka")
    )
    beam_share: float = setting(
        1.0, "share of the beam a cluster gets", minimum=0, open_minimum=True, maximum=1
    )
    steps_per_second: float = setting(
        0.05, "training steps a device makes a second", minimum=0, open_minimum=True
    )
    fixed_rate_bps: float = setting(1e6, "links=fixed: rate, bit/s", minimum=0, open_minimum=True)
    fixed_delay_s: float = setting(0.05, "links=fixed: delay, seconds", minimum=0)

    satellite_server: str = setting(
        "one",
        "one: all satellites are one server; per-satellite: no transfer changes satellite",
        "satellite.server",
        choices=("one", "per-satellite"),
    )
    satellite_rain_percent: float = setting(
        0.0,
        "rain loss that is exceeded this share of the time, %; 0: no rain; needs flwr-moe[rain]",
        "satellite.rain-percent",
        minimum=0,
        maximum=5,
    )
    wireless_bandwidth_hz: float = setting(
        10e6,
        "bandwidth of one direction, shared by all devices",
        "wireless.bandwidth-hz",
        minimum=0,
        open_minimum=True,
    )
    wireless_cell_radius_m: float = setting(
        500.0, "radius of the cell", "wireless.cell-radius-m", minimum=0, open_minimum=True
    )
    wireless_min_distance_m: float = setting(
        35.0,
        "least distance from the base station",
        "wireless.min-distance-m",
        minimum=0,
        open_minimum=True,
    )
    wireless_device_power_dbm: float = setting(
        23.0, "transmit power of a device", "wireless.device-power-dbm"
    )
    wireless_station_power_dbm: float = setting(
        46.0, "transmit power of the base station", "wireless.station-power-dbm"
    )
    wireless_noise_density_dbm_per_hz: float = setting(
        -174.0, "thermal noise", "wireless.noise-density-dbm-per-hz"
    )
    wireless_device_noise_figure_db: float = setting(
        9.0, "noise figure of a device", "wireless.device-noise-figure-db"
    )
    wireless_station_noise_figure_db: float = setting(
        5.0, "noise figure of the base station", "wireless.station-noise-figure-db"
    )
    wireless_fading: bool = setting(True, "Rayleigh block fading", "wireless.fading")
    wireless_coherence_s: float = setting(
        0.05, "seconds a fade lasts", "wireless.coherence-s", minimum=0.001
    )
    wireless_efficiency: float = setting(
        0.6,
        "share of Shannon's rate that is reached",
        "wireless.efficiency",
        minimum=0,
        open_minimum=True,
        maximum=1,
    )
    wireless_delay_s: float = setting(0.01, "delay", "wireless.delay-s", minimum=0)
    trace_file: str = setting(
        "", "CSV with measured rates: time-s, rate-bps, perhaps node and direction", "trace.file"
    )
    trace_repeat: bool = setting(False, "start the trace over when it ends", "trace.repeat")
    trace_delay_s: float = setting(0.0, "delay, seconds", "trace.delay-s", minimum=0)
