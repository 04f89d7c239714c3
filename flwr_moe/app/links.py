"""The links that the settings describe, and where the clusters stand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from flwr_moe.app.registry import LINKS, LinksKind, register_links
from flwr_moe.app.section import ConfigError, Flag, Number, Section, parse_utc, setting

if TYPE_CHECKING:
    from flwr_moe.app.settings import Settings
    from flwr_moe.network import Links
    from flwr_moe.orbit import LinkPreset, RainLoss, Site

PLACES = {
    "Munich": (48.1, 11.6),
    "Tokyo": (35.7, 139.7),
    "São Paulo": (-23.5, -46.6),
    "Denver": (39.7, -105.0),
    "Perth": (-31.9, 115.9),
    "Lagos": (6.5, 3.4),
    "Nairobi": (-1.3, 36.8),
    "Montreal": (45.5, -73.6),
    "Auckland": (-36.8, 174.8),
    "Delhi": (28.6, 77.2),
    "Madrid": (40.4, -3.7),
    "Cape Town": (-33.9, 18.4),
}
"""Default sites, one a cluster."""


class SatelliteSettings(Section):
    """Links by satellite."""

    prefix: ClassVar[str] = "satellite"
    server: Literal["one", "per-satellite"] = setting(
        "one", "one: all satellites are one server; per-satellite: no transfer changes satellite"
    )
    rain_percent: Number = setting(
        0.0,
        "rain loss that is exceeded this share of the time, %; 0: no rain; needs flwr-moe[rain]",
        ge=0,
        le=5,
    )


class WirelessSettings(Section):
    """Links in one cell of a terrestrial network."""

    prefix: ClassVar[str] = "wireless"
    bandwidth_hz: Number = setting(10e6, "bandwidth of one direction, shared by all devices", gt=0)
    cell_radius_m: Number = setting(500.0, "radius of the cell", gt=0)
    min_distance_m: Number = setting(35.0, "least distance from the base station", gt=0)
    device_power_dbm: Number = setting(23.0, "transmit power of a device")
    station_power_dbm: Number = setting(46.0, "transmit power of the base station")
    noise_density_dbm_per_hz: Number = setting(-174.0, "thermal noise")
    device_noise_figure_db: Number = setting(9.0, "noise figure of a device")
    station_noise_figure_db: Number = setting(5.0, "noise figure of the base station")
    fading: Flag = setting(True, "Rayleigh block fading")
    coherence_s: Number = setting(0.05, "seconds a fade lasts", ge=0.001)
    efficiency: Number = setting(0.6, "share of Shannon's rate that is reached", gt=0, le=1)
    delay_s: Number = setting(0.01, "delay", ge=0)


class TraceSettings(Section):
    """Links whose rates were measured."""

    prefix: ClassVar[str] = "trace"
    file: str = setting("", "CSV with measured rates: time-s, rate-bps, perhaps node and direction")
    repeat: Flag = setting(False, "start the trace over when it ends")
    delay_s: Number = setting(0.0, "delay, seconds", ge=0)


def build_links(settings: Settings, num_nodes: int) -> Links:
    """Build the links that the settings describe.

    Parameters
    ----------
    settings : Settings
        ``links`` says which kind.
    num_nodes : int
        Devices that share the network.

    Raises
    ------
    ConfigError
        If a cluster has no pass within the horizon (the line says which), or a key of these links
        cannot be used.
    """
    build = LINKS[settings.links].build
    if build is None:
        raise ConfigError(f"links={settings.links!r}: nothing is simulated")
    return build(settings, num_nodes)


def cluster_sites(settings: Settings) -> tuple[Site, ...]:
    """Return one site for each cluster.

    Raises
    ------
    ConfigError
        If a site cannot be read, is off the globe, or there are too few.
    """
    from flwr_moe.orbit import Site

    try:
        given = tuple(
            Site.parse(part.strip()) for part in settings.sites.split(";") if part.strip()
        )
    except ValueError as err:
        raise ConfigError(f"sites: {err}") from None
    sites = given or tuple(Site(name, *where) for name, where in PLACES.items())
    if len(sites) < settings.num_clusters:
        raise ConfigError(
            f"sites has {len(sites)} places, expected at least num-clusters = "
            f"{settings.num_clusters}"
        )
    return sites[: settings.num_clusters]


def _fixed(settings: Settings, num_nodes: int) -> Links:
    from flwr_moe.network import FixedLinks

    return FixedLinks(settings.fixed_rate_bps, settings.fixed_delay_s)


def _wireless(settings: Settings, num_nodes: int) -> Links:
    from flwr_moe.network import WirelessLinks

    radio = settings.of(WirelessSettings).model_dump()
    horizon_s = (settings.horizon_hours + 24) * 3600
    try:
        return WirelessLinks(num_nodes, seed=settings.seed, horizon_s=horizon_s, **radio)
    except ValueError as err:
        raise ConfigError(f"wireless: {err}") from None


def _trace(settings: Settings, num_nodes: int) -> Links:
    from flwr_moe.network import TraceLinks

    trace = settings.of(TraceSettings)
    if not trace.file:
        raise ConfigError("trace.file is empty, expected a CSV file with links=trace")
    try:
        links = TraceLinks.from_csv(trace.file, repeat=trace.repeat, delay_s=trace.delay_s)
    except (ValueError, OSError) as err:
        raise ConfigError(f"trace.file: {err}") from None
    missing = sorted(set(range(num_nodes)) - set(links.nodes)) if links.nodes else []
    if missing:
        raise ConfigError(f"trace.file: no trace for nodes {missing}")
    return links


def _satellite(settings: Settings, num_nodes: int) -> Links:
    from flwr_moe.network import SatelliteLinks
    from flwr_moe.orbit import constellation, find_passes

    sites = cluster_sites(settings)
    start = parse_utc(settings.start)
    try:
        satellites = constellation(settings.constellation, start)
    except ValueError as err:
        raise ConfigError(f"constellation: {err}") from None
    # Passes after the horizon are looked up too: what is still under way then is not lost.
    hours = settings.horizon_hours + 24
    table = find_passes(satellites, sites, start, hours, settings.min_elevation)
    links = SatelliteLinks(
        table,
        satellites,
        _shared_beam(settings),
        server=settings.of(SatelliteSettings).server,
        extra_loss_db=_rain(settings, sites),
    )
    horizon_s = settings.horizon_hours * 3600
    dark = [
        site.name
        for k, site in enumerate(sites)
        if not any(rise < horizon_s for rise, _ in links.windows(k))
    ]
    if dark:
        raise ConfigError(
            f"no pass of {settings.constellation} above {settings.min_elevation:g} degrees within "
            f"{settings.horizon_hours:g} hours for cluster {', '.join(dark)}"
        )
    return links


def _rain(settings: Settings, sites: tuple[Site, ...]) -> RainLoss | None:
    from flwr_moe.orbit import RainLoss

    percent = settings.of(SatelliteSettings).rain_percent
    if not percent:
        return None
    try:
        return RainLoss(sites, percent)
    except ValueError as err:
        raise ConfigError(f"satellite.rain-percent: {err}") from None


def _shared_beam(settings: Settings) -> LinkPreset:
    from flwr_moe.orbit import HANDHELD_S, VSAT_KA, LinkPreset

    preset = {"handheld-s": HANDHELD_S, "vsat-ka": VSAT_KA}[settings.link_preset]
    return LinkPreset(
        replace(preset.uplink, beam_share=settings.beam_share),
        replace(preset.downlink, beam_share=settings.beam_share),
    )


for _name, _kind in {
    "satellite": LinksKind(_satellite, SatelliteSettings),
    "wireless": LinksKind(_wireless, WirelessSettings),
    "fixed": LinksKind(_fixed),
    "trace": LinksKind(_trace, TraceSettings),
    "real": LinksKind(None),
}.items():
    register_links(_name, _kind)
