from tests.support.preload import load

load("v2")
