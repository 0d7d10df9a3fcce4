module example

go 1.19

require argostreams v0.0.0

replace argostreams => ../../../sdk-c/go
