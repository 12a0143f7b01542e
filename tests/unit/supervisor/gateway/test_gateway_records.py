"""What is looked up: records, verdicts, incidents."""

from __future__ import annotations

import httpx
import pytest

from tests.support.fake_fleet import FakeFleet


async def test_compatibility_filters(client: httpx.AsyncClient, fleet: FakeFleet) -> None:
    path = "/admin/models/compatibility"
    assert (await client.get(path)).json() == {"records": [], "total": 0, "summary": {}}
    params = {"model": "a/b", "backend": "mlx", "outcome": "fail", "since": "12.5", "limit": "1000"}
    await client.get(path, params=params)
    for moment in ("2023-11-14T22:13:20Z", "2023-11-14T22:13:20", "2023-11-15T00:13:20+02:00"):
        await client.get(path, params={"since": moment})
    nothing = {"model": None, "backend": None, "outcome": None, "since": None, "limit": 100}
    assert fleet.records.queries[0] == nothing
    assert fleet.records.queries[1] == {
        "model": "a/b",
        "backend": "mlx",
        "outcome": "fail",
        "since": 12.5,
        "limit": 1000,
    }
    assert [query["since"] for query in fleet.records.queries[2:]] == [1_700_000_000.0] * 3


@pytest.mark.parametrize("name", ["recommendations", "regressions"])
async def test_what_the_records_say(client: httpx.AsyncClient, fleet: FakeFleet, name: str) -> None:
    path = f"/admin/models/compatibility/{name}"
    answer = await client.get(path)
    assert answer.status_code == 200
    assert answer.json() == {name: [], "count": 0}
    await client.get(path, params={"model": "a/b", "backend": "mlx"})
    assert fleet.records.queries == [
        {"model": None, "backend": None},
        {"model": "a/b", "backend": "mlx"},
    ]
    assert (await client.post(path)).status_code == 405


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("outcome", "maybe"),
        ("outcome", ""),
        ("limit", "0"),
        ("limit", "1001"),
        ("limit", "-1"),
        ("limit", "ten"),
        ("limit", "٣"),
        ("limit", "9" * 5000),
        ("since", "yesterday"),
        ("since", "nan"),
        ("since", "inf"),
        ("since", ""),
    ],
)
async def test_bad_compatibility_filters(client: httpx.AsyncClient, param: str, value: str) -> None:
    answer = await client.get("/admin/models/compatibility", params={param: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", param)
