// The identity over shared memory: argo-streams conform --transport shm -- ./identity
package main

import (
	"argostreams"
	"log"
)

func main() {
	stage, err := argostreams.Open()
	if err != nil {
		log.Fatal(err)
	}
	for stage.Next() {
		if err := stage.Emit(stage.Record().Payload()); err != nil {
			log.Fatal(err)
		}
	}
	if err := stage.Close(); err != nil {
		log.Fatal(err)
	}
}
