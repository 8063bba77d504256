"""Parses OpenMetrics text with Prometheus' own library for Python, and prints what it says as JSON."""

import json
import sys

try:
    from prometheus_client.openmetrics.parser import text_string_to_metric_families
except ImportError:
    sys.exit("Debian's python3-prometheus-client is missing: tests/bed/setup installs it")


def number(value):
    return int(value) if value.is_integer() else value


families = []
for family in text_string_to_metric_families(sys.stdin.read()):
    samples = [{"name": s.name, "labels": s.labels, "value": number(float(s.value))} for s in family.samples]
    families.append({
        "name": family.name,
        "type": family.type,
        "unit": family.unit,
        "help": family.documentation,
        "samples": samples,
    })
json.dump(families, sys.stdout)
