"""The run of `federa.simulation` over real sites, with Flower as the network (extra `federa[flower]`).

sites.py        the server's side of a round: asks the sites, yields their updates in client order
server_app.py   Flower's ServerApp: `federa.simulation.run` with that round
client_app.py   Flower's ClientApp: hands requests to the site's worker, or trains in its own process
worker.py       the process that keeps a site's model in memory, behind a unix socket
site.py         what a site does with a request
codec.py        states and updates as bytes, in safetensors     parcel.py   what is sent: facts and bytes
project.py      the files of a deployment: certificates, keys, project, instructions
"""
