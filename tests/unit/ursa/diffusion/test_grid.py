"""The symmetry of the FSQ grid, its tables and their cache."""

import pytest
import torch

from ursa.diffusion import grid
from ursa.diffusion.codebook import DenseCodebook
from ursa.diffusion.grid import GridCodebook, grid_tables, match_grid
from ursa.errors import ConfigError
from ursa.generation import SchedulerConfig
from ursa.tokenizers.quantizers import FSQuantizer

EVERY_LEVELS = [(5, 4, 3), (4, 4, 4, 4), (3, 5, 3, 8, 5), (2, 2), (7,), (8, 5, 5, 5)]


@pytest.mark.parametrize("levels", EVERY_LEVELS)
def test_rows_of_an_orbit_are_one_row_with_its_codes_moved(levels):
    book = GridCodebook(levels, torch.float64)
    tables = grid_tables(levels)
    distances = book.distance(torch.arange(len(book)))
    for code in range(0, len(book), max(1, len(book) // 50)):
        orbit = int(tables.orbit[code])
        near = grid._unsigned(tables.order[orbit])
        moved = book._moved(torch.full_like(near, code), near)
        assert torch.equal(moved.sort().values, torch.arange(len(book)))
        row = distances[int(tables.representative[orbit])][near]
        torch.testing.assert_close(distances[code][moved], row, rtol=0, atol=1e-8)
        assert (row.diff() > -1e-8).all()


@pytest.mark.parametrize("levels", EVERY_LEVELS)
def test_rates_are_those_of_the_plain_sums(levels):
    book, plain = (
        GridCodebook(levels, torch.float64),
        DenseCodebook(FSQuantizer(levels).codebook, torch.float64),
    )
    generator = torch.Generator().manual_seed(0)
    x_1, x_t = torch.randint(len(book), (2, 40, 3), generator=generator)
    for beta in (torch.tensor(0.0), torch.tensor(4.0), torch.tensor([0.1, 2.0, 90.0])):
        got, expected = (each.rate(x_t, x_1, beta.double()) for each in (book, plain))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert book.collisions() == plain.collisions()


def test_the_published_grid_has_the_symmetry_it_is_said_to_have():
    # 3! places, 3! places, 2^3 signs; orbits by counting multisets: C(10, 3) of 8 and C(5, 3) of 3
    levels = (8, 8, 8, 5, 5, 5)
    digits, _ = grid._digits(levels)
    canonical = torch.cat([digits[:, :3].sort(1).values, digits[:, 3:].abs().sort(1).values], 1)
    assert len(canonical.unique(dim=0)) == 1200 == 120 * 10


def test_large_tables_are_kept_and_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "_SMALL_CODES", 10)
    levels = (5, 4, 3)
    grid_tables.cache_clear()
    first = GridCodebook(levels, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "fsq-grid-v1-5x4x3"
    grid_tables.cache_clear()
    monkeypatch.setattr(grid, "_build_tables", None)  # not needed a second time
    again = GridCodebook(levels, cache=tmp_path)
    x = torch.arange(60)
    uniform = torch.rand(60, dtype=torch.float64)
    beta = torch.tensor(2.0)
    assert torch.equal(first.noise(x, beta, uniform), again.noise(x, beta, uniform))
    grid_tables.cache_clear()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(grid, "_SMALL_CODES", 10)
    grid_tables.cache_clear()
    (tmp_path / "file").write_text("")
    book = GridCodebook((4, 4, 3), cache=tmp_path / "file" / "cache")
    assert len(book) == 48
    assert "tables of the FSQ grid are not kept" in caplog.text
    grid_tables.cache_clear()


def test_damaged_tables_are_made_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(grid, "_SMALL_CODES", 10)
    levels, x = (5, 4, 3), torch.arange(60)
    for damage in (
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: path.write_bytes(b""),
    ):
        grid_tables.cache_clear()
        GridCodebook(levels, cache=tmp_path)
        (folder,) = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o755
        damage(folder / "order.npy")
        grid_tables.cache_clear()
        caplog.clear()
        book = GridCodebook(levels, cache=tmp_path)
        assert "damaged and made again" in caplog.text
        drawn = book.noise(x, torch.tensor(1e9), torch.rand(60))
        assert (book.distance(x).gather(-1, drawn[:, None]) < 1e-6).all()
    grid_tables.cache_clear()


def test_a_grid_without_symmetry_has_no_tables():
    assert grid.num_orbits((8, 8, 8, 5, 5, 5)) == 1200
    for levels in EVERY_LEVELS:
        assert grid.num_orbits(levels) == len(grid_tables(levels).representative)
    levels = (16, 15, 14, 13)
    assert not grid.has_small_tables(levels)
    with pytest.raises(ConfigError, match="too little symmetry for tables: 12544 orbits"):
        GridCodebook(levels)
    codes = grid.grid_codes(levels)
    assert type(SchedulerConfig().codebook(codes, levels)) is DenseCodebook


def test_grids_are_known_by_their_directions():
    levels = (5, 4, 3)
    codes = FSQuantizer(levels).codebook
    assert match_grid(codes, levels)
    assert match_grid(torch.nn.functional.normalize(codes), levels)
    assert not match_grid(codes, (5, 3, 4))
    assert not match_grid(codes.flip(0), levels)
    assert not match_grid(codes, (60,))


@pytest.mark.parametrize(
    ("levels", "message"),
    [((), "at least 2 each"), ((8, 1), "at least 2 each"), ((64, 64, 64), "at most 65536 codes")],
)
def test_levels_that_do_not_fit_are_named(levels, message):
    with pytest.raises(ConfigError, match=message):
        GridCodebook(levels)
