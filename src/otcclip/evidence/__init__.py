"""What can be known of a pair without trusting its caption: look-alikes, views, and the distance d(image, caption).

Shared by the defences, which train on what is borne out, and by the detectors, which score it.
"""
