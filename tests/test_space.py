"""Features of neighbours and coordinates: what they are of, what they do not depend on, what is refused."""

from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from scjax.datasets.space import (
    centred_coordinates,
    neighbour_features,
    planted_sections,
    shuffled,
)

K, D = 5, 3


@pytest.fixture(scope="module")
def sections():
    """Two sections with cells anywhere, and one on an array, where many neighbours are equally far."""
    adata = planted_sections(3, 100, seed=3)
    side = np.arange(10.0)
    adata.obsm["spatial"][200:] = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    return adata


def features(adata, **options):
    adata = adata.copy()
    neighbour_features(adata, K, D, section_key="section", **options)
    return adata.obsm["neighbours"]


def moved(adata, turn, mirror=False, shift=(0.0, 0.0), scale=1.0):
    """Each section turned by an angle of its own, mirrored, moved."""
    out = adata.copy()
    for s, name in enumerate(adata.obs["section"].cat.categories):
        rows = (adata.obs["section"] == name).to_numpy()
        c, n = np.cos(turn * (s + 1)), np.sin(turn * (s + 1))
        matrix = np.array([[c, -n], [n, c]]) @ np.diag([-1.0 if mirror else 1.0, 1.0])
        out.obsm["spatial"][rows] = scale * out.obsm["spatial"][rows] @ matrix.T + np.multiply(shift, s + 1)
    return out


def test_features_are_those_of_the_nearest_cells(sections):
    told = np.arange(3.0 * sections.n_obs).reshape(-1, 3)
    adata = sections[:200].copy()
    adata.obsm["own"] = told[:200]
    neighbour_features(adata, K, D, section_key="section", features="own", key_added="near")
    far = cdist(adata.obsm["spatial"], adata.obsm["spatial"])
    other = adata.obs["section"].to_numpy()[:, None] != adata.obs["section"].to_numpy()
    far[other | np.eye(len(far), dtype=bool)] = np.inf
    wanted = told[np.argsort(far, axis=1)[:, :K]]
    # the tolerance may exchange two that are as good as equally far, and nothing else
    same = (adata.obsm["near"].reshape(-1, K, D) == wanted).all(-1)
    assert same.mean() > 0.98
    np.testing.assert_array_equal(np.sort(adata.obsm["near"][:, ::D]), np.sort(wanted[:, :, 0]))
    neighbour_features(adata, K, D, section_key="section", features="own", summary="mean")
    np.testing.assert_allclose(adata.obsm["neighbours"], wanted.mean(1), rtol=1e-6)


@pytest.mark.parametrize(
    "turn, mirror, shift", [(0.7, False, (0, 0)), (2.1, True, (0, 0)), (0, False, (317.7, -5e3))]
)
def test_neighbours_are_the_same_to_the_bit_however_a_section_lies(sections, turn, mirror, shift):
    for summary in ("each", "mean"):
        changed = features(moved(sections, turn, mirror, shift), summary=summary)
        np.testing.assert_array_equal(changed, features(sections, summary=summary))
    squeezed = sections.copy()
    squeezed.obsm["spatial"][:, 0] /= 2
    assert (features(squeezed) != features(sections)).any(1).mean() > 0.5


def test_neighbours_do_not_depend_on_the_order_of_cells_nor_on_other_sections(sections):
    sections = sections.copy()
    sections.obsm["own"] = np.random.default_rng(0).normal(size=(sections.n_obs, D))
    whole = features(sections, features="own")
    order = np.random.default_rng(1).permutation(sections.n_obs)
    np.testing.assert_array_equal(features(sections[order].copy(), features="own"), whole[order])
    np.testing.assert_array_equal(features(sections[100:200].copy(), features="own"), whole[100:200])


def test_equally_far_neighbours_are_not_chosen_by_where_they_lie(sections):
    """On an array, the fifth of five neighbours is one of four at the diagonal: any, not one side's."""
    adata = sections[200:].copy()
    adata.obsm["own"] = adata.obsm["spatial"].copy()
    neighbour_features(adata, K, 2, features="own")
    inner = ((adata.obsm["spatial"] > 0) & (adata.obsm["spatial"] < 9)).all(1)
    step = adata.obsm["neighbours"].reshape(-1, K, 2)[inner] - adata.obsm["spatial"][inner][:, None]
    np.testing.assert_array_equal(np.abs(step[:, :4]).sum(-1), 1)
    np.testing.assert_array_equal(np.abs(step[:, 4]).sum(-1), 2)
    assert len(np.unique(step[:, 4], axis=0)) == 4
    assert (np.abs(step[:, 4].mean(0)) < 0.4).all()


def test_components_are_fitted_on_the_training_sections_alone(sections):
    one = features(sections, train=["s0", "s1"])
    changed = sections.copy()
    other = changed.X.toarray()
    other[200:] = other[200:, ::-1]
    changed.X = other
    two = features(changed, train=["s0", "s1"])
    np.testing.assert_array_equal(one[:200], two[:200])
    assert (one[200:] != two[200:]).any()
    assert not np.allclose(features(sections)[:200], one[:200], atol=1e-3)


def test_coordinates_do_not_depend_on_where_a_section_lies_but_on_its_turn(sections):
    def coordinates(adata):
        centred_coordinates(adata, section_key="section")
        return adata.obsm["coordinates"]

    plain = coordinates(sections.copy())
    for rows in (slice(0, 100), slice(100, 200), slice(200, 300)):
        np.testing.assert_allclose(plain[rows].mean(0), 0, atol=1e-6)
        np.testing.assert_allclose((plain[rows] ** 2).sum(1).mean(), 1, rtol=1e-5)
    np.testing.assert_allclose(coordinates(moved(sections, 0, shift=(40.0, -7.0))), plain, atol=1e-5)
    np.testing.assert_allclose(coordinates(moved(sections, 0, scale=12.0)), plain, atol=1e-5)
    assert np.abs(coordinates(moved(sections, 0.7)) - plain).max() > 0.5
    assert np.abs(coordinates(moved(sections, 0, mirror=True)) - plain).max() > 0.5


def test_shuffling_stays_within_sections(sections):
    section = sections.obs["section"]
    values = np.column_stack([section.cat.codes, np.arange(len(section))])
    mixed = shuffled(values, section, seed=1)
    np.testing.assert_array_equal(mixed[:, 0], values[:, 0])
    np.testing.assert_array_equal(np.sort(mixed[:, 1]), values[:, 1])
    assert (mixed[:, 1] == values[:, 1]).mean() < 0.1


def test_bad_input_is_named(sections):
    usual: dict[str, Any] = {"k": K, "components": D, "section_key": "section"}

    def told(kind, words, change=None, **options: Any):
        adata = sections.copy()
        if change:
            change(adata)
        with pytest.raises(kind) as error:
            neighbour_features(adata, **(usual | options))
        for word in words:
            assert word in str(error.value)

    told(KeyError, ["'array'", "spatial"], spatial_key="array")
    told(KeyError, ["'slide'", "section"], section_key="slide")
    told(KeyError, ["'X_pca'", "spatial"], features="X_pca")
    told(KeyError, ["'counts'"], layer="counts")
    told(KeyError, ["s9", "s0"], train=["s9"])
    told(ValueError, ["'s0'", "100 cells", "100 neighbours"], k=100)
    told(ValueError, ["at least 1"], k=0)
    told(ValueError, ["24 components", "24 genes"], components=24)
    told(ValueError, ["(300, 1)", "3 or more"], features="field")

    def lost(adata):
        adata.obsm["spatial"][[7, 130]] = np.nan

    told(ValueError, ["2 cells", "'s0_7'", "'s0'", "finite"], lost)

    def twice(adata):
        adata.obsm["spatial"][150] = adata.obsm["spatial"][149]

    told(ValueError, ["2 cells", "'s1_149'", "'s1'", "drop the copies"], twice)

    def words(adata):
        adata.obsm["spatial"] = adata.obsm["spatial"].astype(str).astype(object)
        adata.obsm["spatial"][0, 0] = "left"

    told(ValueError, ["numbers", "left"], words)

    def flat(adata):
        adata.obsm["spatial"] = adata.obsm["spatial"][:, :1]

    told(ValueError, ["(300, 1)", "2 or 3"], flat)

    def unlabelled(adata):
        adata.obs["section"] = adata.obs["section"].astype(object)
        adata.obs.iloc[4, 0] = None

    told(ValueError, ["1 cells", "'section'"], unlabelled)

    def named_alike(adata):
        adata.obs_names = ["cell"] * adata.n_obs

    told(ValueError, ["share names"], named_alike)
