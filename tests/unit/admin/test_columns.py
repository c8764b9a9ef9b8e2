"""Which columns of a table a narrow terminal gets to see."""

from __future__ import annotations

from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from admin.columns import GAP, HANDLES, ID_TAIL, MAX_FITTED, Column, fitted

IDS = [str(UUID(int=number << 64 | 0xFFFF + number)) for number in range(3)]
tables = st.integers(1, 4).flatmap(
    lambda rows: st.lists(
        st.builds(
            lambda name, cells: Column(name, name, cells),
            st.sampled_from(["id", "number", "name", "kind", "address", "at", "group", "who"]),
            st.lists(st.text("ab", max_size=60), min_size=rows, max_size=rows),
        ),
        max_size=8,
        unique_by=lambda column: column.name,
    )
)


def named(*columns: Column) -> list[str]:
    return [each.name for each in columns]


@given(tables, st.integers(1, 200))
def test_what_is_shown_fits_or_is_what_names_the_rows(columns: list[Column], width: int) -> None:
    shown, left_out = fitted(columns, width)
    total = sum(each.width for each in shown) + GAP * (len(shown) - 1)
    assert total <= width or set(named(*shown)) <= set(HANDLES)
    assert sorted(named(*shown) + left_out) == sorted(named(*columns))
    assert named(*shown) == [each.name for each in columns if each.name not in left_out]
    if set(named(*columns)) & set(HANDLES):
        assert set(named(*shown)) & set(HANDLES)
    for each in shown:
        (before,) = (column for column in columns if column.name == each.name)
        if each.name in HANDLES:
            assert each.cells == before.cells


def test_what_fits_is_shown_as_it_is() -> None:
    columns = [Column("id", "id", IDS), Column("note", "note", ["x" * 41] * 3)]
    assert fitted(columns, 79) == (columns, [])


def test_long_texts_and_other_things_ids_are_cut_first() -> None:
    columns = [
        Column("name", "name", ["a", "a", "b"]),
        Column("token_id", "token", IDS),
        Column("note", "note", ["x" * 41, "y", "z"]),
    ]
    shown, left_out = fitted(columns, 80)
    assert not left_out
    assert shown[1].cells == ["…" + id[-ID_TAIL:] for id in IDS]
    assert shown[2].cells[0] == "x" * (MAX_FITTED - 1) + "…"


def test_the_id_goes_where_names_are_clear_and_stays_where_not() -> None:
    clear = [Column("id", "id", IDS), Column("name", "name", ["a", "b", "c"])]
    other = Column("kind", "kind", ["user", "user", "service"])
    assert fitted([*clear, other], 40)[1] == ["id"]
    unclear = [Column("id", "id", IDS), Column("name", "name", ["a", "a", ""])]
    assert fitted([*unclear, other], 45)[1] == ["kind"]


def test_what_is_the_same_in_all_rows_goes_before_the_last_column() -> None:
    columns = [
        Column("name", "name", ["a", "b"]),
        Column("kind", "kind", ["user", "user"]),
        Column("email", "email", ["a@example.org", "b@example.org"]),
    ]
    assert fitted(columns, 20)[1] == ["kind"]
