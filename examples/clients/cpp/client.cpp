// Streams one answer. client ADDRESS PROMPT
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <iostream>

#include "octavo/inference/v1/generation.grpc.pb.h"

namespace api = octavo::inference::v1;

int main(int, char** argv) {
  auto stub = api::GenerationService::NewStub(grpc::CreateChannel(argv[1], grpc::InsecureChannelCredentials()));

  api::GenerateStreamRequest request;
  auto* generation = request.mutable_generation();
  generation->set_model("smollm2-135m-instruct");
  generation->mutable_sampling()->set_temperature(0);
  auto* message = generation->mutable_chat()->add_messages();
  message->set_role("user");
  message->add_parts()->set_text(argv[2]);

  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::minutes(2));
  auto reader = stub->GenerateStream(&context, request);
  api::GenerateStreamResponse response;
  while (reader->Read(&response)) {
    if (response.event().has_delta()) std::cout << response.event().delta().text() << std::flush;
    if (response.event().has_completed())
      std::cout << "\n" << response.event().completed().usage().output_tokens() << " tokens\n";
  }
  const grpc::Status status = reader->Finish();
  if (!status.ok()) std::cerr << status.error_code() << ": " << status.error_message() << "\n";
  return status.ok() ? 0 : 1;
}
