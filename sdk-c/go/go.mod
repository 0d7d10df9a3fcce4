module argostreams

go 1.19
