"""The README's tables are what the records say."""

from benchmarks.plot import README, every_table, read_records, tables


def test_readme_tables_are_not_stale():
    readme = README.read_text(encoding="utf-8")
    assert {record["name"] for record in read_records()} == {"demo", "20newsgroups-alpha10", "20newsgroups-alpha1"}
    texts = every_table()
    asked = [line.removeprefix("<!-- table ").removesuffix(" -->") for line in readme.splitlines()
             if line.startswith("<!-- table ")]  # fmt: skip
    assert {record["name"] for record in read_records()} <= set(asked) <= set(texts)
    assert tables(readme, texts) == readme


def test_a_table_is_made_anew_between_its_markers():
    readme = "before\n<!-- table a -->\nold\n<!-- end -->\nafter\n"
    assert tables(readme, {"a": "new\n", "b": "unused\n"}) == readme.replace("old", "new")
