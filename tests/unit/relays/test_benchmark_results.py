"""What the benchmark of the relay makes of figures: ratios, nulls, and which run counts."""

from __future__ import annotations

import pytest

from benchmarks.relay import MOST_LOSS, rank
from benchmarks.relay_load import Carried, frame
from benchmarks.relay_results import COTURN, DIRECT, KEYS, OURS, WAYS, XDP, Figures, summary


def figures(
    *, per_s: float = 1000.0, cpu_us: float = 2.0, used_us: float = 10.0, round_trip_us: float = 50
) -> Figures:
    taken: Figures = {"round trip us": round_trip_us}
    for way in WAYS.values():
        taken[f"thin 172 {way} per_s"] = per_s
        taken[f"thin 172 {way} cpu_us"] = cpu_us
        taken[f"paced 172 {way} used_us"] = taken[f"paced 172 {way} busy_us"] = used_us
    return taken


def carried(per_s: float, loss: float) -> Carried:
    return Carried(
        per_s=per_s, sent_per_s=per_s, loss=loss, window_full=1.0, cpu_us=1.0, busy_us=1.0,
        own_us=1.0, used_us=1.0, core_share=1.0,
    )  # fmt: skip


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds() -> None:
    last = summary(
        {
            COTURN: [figures(per_s=1000), figures(per_s=2000), figures(per_s=500)],
            OURS: [figures(per_s=1500), figures(per_s=2200), figures(per_s=5000)],
        },
        {OURS: "python"},
    )
    assert last["thin_172_vs_coturn"] == last["thin_172_pure_vs_coturn"] == 1.5
    assert last["mode"] == "python"


def test_a_compiled_relay_has_no_pure_figure_of_its_own() -> None:
    last = summary({COTURN: [figures()], OURS: [figures()]}, {OURS: "compiled"})
    assert last["thin_172_vs_coturn"] == 1
    assert last["thin_172_pure_vs_coturn"] is None


def test_twice_the_time_for_a_packet_is_half_as_many_in_a_second() -> None:
    last = summary({COTURN: [figures(cpu_us=2)], OURS: [figures(cpu_us=4)]}, {})
    assert last["cpu_per_packet_vs_coturn"] == 2
    assert last["thin_172_per_cpu_s_vs_coturn"] == 0.5


def test_what_a_relay_adds_is_beyond_what_the_generator_alone_used() -> None:
    last = summary(
        {
            DIRECT: [figures(used_us=3, round_trip_us=10)],
            COTURN: [figures(used_us=8, round_trip_us=70)],
            XDP: [figures(used_us=4, round_trip_us=16)],
        },
        {},
    )
    assert last["xdp_cpu_per_packet_vs_coturn"] == pytest.approx(0.2)
    assert last["coturn_latency_added_us"] == 30


def test_what_was_not_measured_is_null() -> None:
    last = summary({OURS: [{}]}, {})
    assert all(last[key] is None for key in KEYS if key not in ("mode", "coturn_version"))


def test_the_best_run_is_the_fastest_of_those_that_lost_little() -> None:
    slow, fast, lossy = carried(10, 0.0), carried(20, MOST_LOSS / 2), carried(99, 0.2)
    assert max([slow, lossy, fast], key=rank) is fast
    assert max([carried(50, 0.5), lossy], key=rank) is lossy


def test_a_frame_has_the_checksums_of_its_headers() -> None:
    made = frame(bytes(12), ("198.51.100.2", 1000), ("198.51.100.1", 3478), b"data")
    ip = made[10 + 14 :][:20]
    assert sum(int.from_bytes(ip[i : i + 2], "big") for i in range(0, 20, 2)) % 0xFFFF == 0
    assert int.from_bytes(ip[2:4], "big") == len(made) - 10 - 14
