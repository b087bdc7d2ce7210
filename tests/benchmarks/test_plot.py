"""The README's tables are what the records say."""

from benchmarks.plot import README, read_records, tables


def test_readme_tables_are_not_stale():
    readme = README.read_text(encoding="utf-8")
    records = read_records()
    assert {record["name"] for record in records} == {"demo", "20newsgroups-alpha10", "20newsgroups-alpha1"}
    assert all(f"<!-- table {record['name']} -->" in readme for record in records)
    assert tables(readme, records) == readme
