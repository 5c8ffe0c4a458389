"""Conformance kits: is a plugin fit to be compared with the others?

    from kick.testing import check_compressor, check_suite
    check_compressor(MyCompressor)                      # raises ConformanceError naming every check that fails
    check_suite(MySuite)

Or one test for each check:

    @pytest.mark.parametrize("check", compressor_checks(MyCompressor), ids=lambda check: check.name)
    def test_conformance(check):
        check.run()
"""

from kick.testing.check import Check, ConformanceError
from kick.testing.compressors import ARCHITECTURES, check_compressor, compressor_checks
from kick.testing.suites import check_suite, suite_checks
from kick.testing.tiny import tiny_calibration, tiny_model, tiny_tokenizer

__all__ = [
    "ARCHITECTURES",
    "Check",
    "ConformanceError",
    "check_compressor",
    "check_suite",
    "compressor_checks",
    "suite_checks",
    "tiny_calibration",
    "tiny_model",
    "tiny_tokenizer",
]
