"""Where the clusters stand."""

from __future__ import annotations

from flwr_moe.app.config import Settings
from flwr_moe.app.spec import ConfigError
from flwr_moe.orbit import Site

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
