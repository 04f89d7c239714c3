"""Where the clusters stand, and the links from there."""

from __future__ import annotations

from dataclasses import replace

from flwr_moe.app.config import Settings
from flwr_moe.app.spec import ConfigError, parse_utc
from flwr_moe.network import FixedLinks, Links, SatelliteLinks
from flwr_moe.orbit import HANDHELD_S, VSAT_KA, LinkPreset, Site, constellation, find_passes

PLACES = (
    Site("Munich", 48.1, 11.6),
    Site("Tokyo", 35.7, 139.7),
    Site("São Paulo", -23.5, -46.6),
    Site("Denver", 39.7, -105.0),
    Site("Perth", -31.9, 115.9),
    Site("Lagos", 6.5, 3.4),
    Site("Nairobi", -1.3, 36.8),
    Site("Montreal", 45.5, -73.6),
    Site("Auckland", -36.8, 174.8),
    Site("Delhi", 28.6, 77.2),
    Site("Madrid", 40.4, -3.7),
    Site("Cape Town", -33.9, 18.4),
)
"""Default sites, one a cluster."""

PRESETS = {"handheld-s": HANDHELD_S, "vsat-ka": VSAT_KA}


def cluster_sites(settings: Settings) -> tuple[Site, ...]:
    """Return one site for each cluster.

    Raises
    ------
    ConfigError
        If a site cannot be read, is off the globe, or there are too few.
    """
    try:
        given = tuple(
            Site.parse(part.strip()) for part in settings.sites.split(";") if part.strip()
        )
    except ValueError as err:
        raise ConfigError(f"sites: {err}") from None
    sites = given or PLACES
    if len(sites) < settings.num_clusters:
        raise ConfigError(
            f"sites has {len(sites)} places, expected at least num-clusters = "
            f"{settings.num_clusters}"
        )
    return sites[: settings.num_clusters]


def build_links(settings: Settings) -> Links:
    """Build the links that the settings describe.

    Raises
    ------
    ConfigError
        If a cluster has no pass within the horizon; the line says which.
    """
    if settings.links == "fixed":
        return FixedLinks(settings.fixed_rate_bps, settings.fixed_delay_s)
    sites = cluster_sites(settings)
    start = parse_utc(settings.start)
    try:
        satellites = constellation(settings.constellation, start)
    except ValueError as err:
        raise ConfigError(f"constellation: {err}") from None
    # Passes after the horizon are looked up too: what is still under way then is not lost.
    hours = settings.horizon_hours + 24
    table = find_passes(satellites, sites, start, hours, settings.min_elevation)
    links = SatelliteLinks(table, satellites, _shared_beam(settings))
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


def _shared_beam(settings: Settings) -> LinkPreset:
    preset = PRESETS[settings.link_preset]
    return LinkPreset(
        replace(preset.uplink, beam_share=settings.beam_share),
        replace(preset.downlink, beam_share=settings.beam_share),
    )
