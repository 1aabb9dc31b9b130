"""Read pictures that matplotlib wrote as SVG."""

import xml.etree.ElementTree as ET


def tick_labels(svg: ET.Element, anchor: str) -> list[str]:
    """Return the labels of the x axis ("middle") or the y axis ("end")."""
    labels = [t for t in svg.iter("text") if f"text-anchor: {anchor}" in t.get("style") and len(t.text) < 12]
    return [label.text for label in labels]
