from __future__ import annotations

import pytest

from flwr_moe.app.links import PLACES, build_links, cluster_sites
from flwr_moe.app.settings import ConfigError, Settings
from flwr_moe.network import FixedLinks, NodeProfile, SatelliteLinks


def test_default_sites_are_the_first_places() -> None:
    sites = cluster_sites(Settings(num_clusters=3, num_experts=3))
    assert [site.name for site in sites] == list(PLACES)[:3]


def test_sites_from_settings() -> None:
    sites = cluster_sites(Settings(num_clusters=2, sites="48.1,11.6; -33.9,18.4,100"))
    assert [(s.latitude_deg, s.longitude_deg, s.altitude_m) for s in sites] == [
        (48.1, 11.6, 0.0),
        (-33.9, 18.4, 100.0),
    ]


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("91,0;0,0", r"sites: .*latitude = 91, expected -90 to 90"),
        ("0,181;0,0", r"sites: .*longitude = 181, expected -180 to 180"),
        ("north,0;0,0", r"sites: site 'north,0': expected LAT,LON"),
        ("0,0", r"sites has 1 places, expected at least num-clusters = 2"),
    ],
)
def test_bad_sites(sites: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster_sites(Settings(num_clusters=2, sites=sites))


def test_a_cluster_without_a_pass_is_named() -> None:
    # Above 61.5 degrees of latitude a 53-degree shell at 550 km is never 25 degrees high.
    settings = Settings(num_clusters=2, sites="48.1,11.6;70,20", horizon_hours=24)
    with pytest.raises(ConfigError, match=r"no pass of delta-4 .* cluster 70,20$"):
        build_links(settings, 6)


def test_unknown_constellation() -> None:
    with pytest.raises(ConfigError, match=r"constellation: .*delta-5"):
        build_links(Settings(constellation="delta-5"), 6)


def test_links_outlive_the_horizon() -> None:
    # A reply under way at the horizon is late, not lost.
    links = build_links(Settings(horizon_hours=12), 6)
    assert isinstance(links, SatelliteLinks)
    node = NodeProfile(1, 0, site=0)
    assert 12 * 3600 < links.next_contact(node, "uplink", 12 * 3600) < 36 * 3600


def test_fixed_links() -> None:
    settings = Settings(links="fixed", fixed_rate_bps=1e6, fixed_delay_s=0.5)
    assert build_links(settings, 6) == FixedLinks(1e6, 0.5)
