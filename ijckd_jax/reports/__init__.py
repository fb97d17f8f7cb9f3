"""What people read: reports, plots and pages of runs and bounds.

`report` writes a run's report, `bound_wording` and `bound_plots` a bound's;
`plots`, `tables` and `web_page` are what both are made of. Numbers come from
elsewhere: nothing is computed here but what a picture or a table needs.
"""
