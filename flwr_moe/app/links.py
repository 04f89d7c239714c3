"""The links that the settings describe."""

from __future__ import annotations

from dataclasses import replace

from flwr_moe.app.config import Settings
from flwr_moe.app.sites import cluster_sites
from flwr_moe.app.spec import ConfigError, parse_utc
from flwr_moe.network import FixedLinks, Links, SatelliteLinks, TraceLinks, WirelessLinks
from flwr_moe.orbit import (
    HANDHELD_S,
    VSAT_KA,
    LinkPreset,
    RainLoss,
    Site,
    constellation,
    find_passes,
)

PRESETS = {"handheld-s": HANDHELD_S, "vsat-ka": VSAT_KA}


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
    if settings.links == "fixed":
        return FixedLinks(settings.fixed_rate_bps, settings.fixed_delay_s)
    if settings.links == "wireless":
        return _wireless(settings, num_nodes)
    if settings.links == "trace":
        return _trace(settings, num_nodes)
    return _satellite(settings)


def _wireless(settings: Settings, num_nodes: int) -> Links:
    try:
        return WirelessLinks(
            num_nodes,
            seed=settings.seed,
            cell_radius_m=settings.wireless_cell_radius_m,
            min_distance_m=settings.wireless_min_distance_m,
            bandwidth_hz=settings.wireless_bandwidth_hz,
            device_power_dbm=settings.wireless_device_power_dbm,
            station_power_dbm=settings.wireless_station_power_dbm,
            noise_density_dbm_per_hz=settings.wireless_noise_density_dbm_per_hz,
            device_noise_figure_db=settings.wireless_device_noise_figure_db,
            station_noise_figure_db=settings.wireless_station_noise_figure_db,
            fading=settings.wireless_fading,
            coherence_s=settings.wireless_coherence_s,
            efficiency=settings.wireless_efficiency,
            delay_s=settings.wireless_delay_s,
            horizon_s=(settings.horizon_hours + 24) * 3600,
        )
    except ValueError as err:
        raise ConfigError(f"wireless: {err}") from None


def _trace(settings: Settings, num_nodes: int) -> Links:
    if not settings.trace_file:
        raise ConfigError("trace.file is empty, expected a CSV file with links=trace")
    try:
        links = TraceLinks.from_csv(
            settings.trace_file, repeat=settings.trace_repeat, delay_s=settings.trace_delay_s
        )
    except (ValueError, OSError) as err:
        raise ConfigError(f"trace.file: {err}") from None
    missing = sorted(set(range(num_nodes)) - set(links.nodes)) if links.nodes else []
    if missing:
        raise ConfigError(f"trace.file: no trace for nodes {missing}")
    return links


def _satellite(settings: Settings) -> SatelliteLinks:
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
        server=settings.satellite_server,
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
    if not settings.satellite_rain_percent:
        return None
    try:
        return RainLoss(sites, settings.satellite_rain_percent)
    except ValueError as err:
        raise ConfigError(f"satellite.rain-percent: {err}") from None


def _shared_beam(settings: Settings) -> LinkPreset:
    preset = PRESETS[settings.link_preset]
    return LinkPreset(
        replace(preset.uplink, beam_share=settings.beam_share),
        replace(preset.downlink, beam_share=settings.beam_share),
    )
