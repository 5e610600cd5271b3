// Streams one answer. client ADDRESS PROMPT
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"
	"octavo/common"
	"octavo/inference"
)

func main() {
	address, prompt := os.Args[1], os.Args[2]
	connection, err := grpc.Dial(address, grpc.WithInsecure())
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel() // also ends the work, if the stream is left early

	temperature := float32(0)
	message := &inference.Message{
		Role:  "user",
		Parts: []*inference.Part{{Content: &inference.Part_Text{Text: prompt}}},
	}
	stream, err := inference.NewGenerationServiceClient(connection).GenerateStream(ctx, &inference.GenerateStreamRequest{
		Generation: &inference.Generation{
			Model:    "smollm2-135m-instruct",
			Prompt:   &inference.Generation_Chat{Chat: &inference.Chat{Messages: []*inference.Message{message}}},
			Sampling: &common.SamplingParams{Temperature: &temperature},
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	for {
		response, err := stream.Recv()
		if err == io.EOF {
			return
		}
		if err != nil {
			log.Fatal(err) // status.Convert(err).Details() says what to change
		}
		fmt.Print(response.Event.GetDelta().GetText())
		if completed := response.Event.GetCompleted(); completed != nil {
			fmt.Printf("\n%d tokens\n", completed.Usage.OutputTokens)
		}
	}
}
