"""The page of kernels: shares of the roofline where something was timed, "not run" where not."""

import kernels

CASE = {"bytes": 2e6, "operations": 1e6}
RUN = {"settings": {"device": "a GPU", "rounds": 3}, "rates": {"bytes_per_s": 1e12, "ops_per_s": 1e15}}


def test_a_time_stands_beside_the_roofline_and_the_others():
    times = {"kernel": [4e-6, 4e-6, 5e-6], "xla": [8e-6, 8e-6, 15e-6], "bfloat16": [2e-6] * 3}
    [table] = kernels.page(RUN | {"cases": {"a product": CASE | {"seconds": times}}}).tables
    assert table.rows == [
        ("a product", "4.0 (4.0 to 5.0)", "50 %", "2.00 (2.00 to 3.00)", "0.50 (0.40 to 0.50)")
    ]


def test_without_a_gpu_no_cell_has_a_number():
    page = kernels.page(RUN | {"rates": None, "cases": {"a product": CASE | {"seconds": None}}})
    assert page.tables[0].rows == [("a product", *["not run"] * 4)] and "nothing was timed" in page.text
