"""Runs llama.cpp's server with a model and, if given, its projector, and prints its address. See scripts/other-server."""
import sys
import time

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
if len(sys.argv) > 2:
    params.mmproj.path = sys.argv[2]
params.n_ctx, params.n_parallel, params.port = 8192, 2, 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
while True:
    time.sleep(60)
