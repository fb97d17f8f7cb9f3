"""What everything stands on: devices, hosts, folders, configs and words.

`parallel` maps steps over devices, `hosts` are several processes as one run,
`workdirs`, `locks`, `disk` and `compilation_cache` are folders and files,
`config_utils` reads configs, names and flags and says what is wrong with them,
`markdown` escapes text for people, `progress` says how far long work is, and
`moved` knows the old names of modules. Imports nothing of the package outside
of this folder.
"""
